"""The attribute model as a language model, on the rows, the split and the layers of rm_smollm2.py.

A folder with the weights also serves: --config.model.source=DIR. Behind each response it learns to write the label line
of its ratings; `annotate` reads expected ratings off the probabilities. See docs/attribute_lm.md.
"""

from steerjax.config import default_config


def get_config():
    config = default_config()
    config.objectives = ("attribute_lm",)
    config.data.validation_fraction = 0.2

    config.chat.template = "chatml"
    config.model.source = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.model.keep_layers = 12
    config.optimizer.frozen_layers = 9
    config.compute.cache_frozen = True

    config.batch.rows = 4
    config.batch.row_length = 2048  # tokens; label lines included
    config.batch.micro_batches = 4  # on two cores; 1 on an accelerator

    config.optimizer.learning_rate = 4e-4
    config.optimizer.min_learning_rate = 4e-5
    config.optimizer.warmup_steps = 3
    config.optimizer.weight_decay = 0.01
    config.train.epochs = 4.0
    config.train.evaluate_every = 12
    config.train.checkpoint_every = 20
    return config
