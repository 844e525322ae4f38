"""A reward model from SmolLM2-135M-Instruct on the HelpSteer rows that ship in the package.

A folder with the weights also serves: --config.model.source=DIR. The middle layers of this model tell more about
ratings than the last ones, so the first 12 layers are kept, and the upper 3 of them are trained on the cached outputs
of the first 9. docs/notes/smollm2_packaged_rows.md has what else was tried.
"""

from steerjax.config import default_config


def get_config():
    config = default_config()
    config.data.validation_fraction = 0.2

    config.chat.template = "chatml"
    config.model.source = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.model.keep_layers = 12
    config.optimizer.frozen_layers = 9
    config.compute.cache_frozen = True

    config.batch.rows = 4
    config.batch.row_length = 2048  # tokens; the longest row of the sample has 1724
    config.batch.micro_batches = 4  # on two cores; 1 on an accelerator

    config.optimizer.learning_rate = 4e-4
    config.optimizer.min_learning_rate = 4e-5
    config.optimizer.warmup_steps = 3
    config.optimizer.weight_decay = 0.01
    config.train.epochs = 4.0
    config.train.evaluate_every = 12
    config.train.checkpoint_every = 20
    return config
