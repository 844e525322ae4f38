"""A chat model conditioned on ratings, from SmolLM2-135M-Instruct; a folder with the weights also serves as source.

The rows that ship in the package carry human ratings. For conversations with predicted ratings (`annotate`):

    --config.data.train="('annotated.jsonl',)" --config.sft.ratings=predicted
"""

from steerjax.config import default_config


def get_config():
    config = default_config()
    config.objectives = ("sft",)

    config.chat.template = "chatml"
    config.model.source = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.sft.default_ratings = {
        "helpfulness": 4.0, "correctness": 4.0, "coherence": 4.0, "complexity": 2.0, "verbosity": 2.0,
    }  # fmt: skip

    config.batch.rows = 4  # short steps: what a label means is learned late, after some hundred steps
    config.batch.row_length = 2048
    config.batch.micro_batches = 4  # on two cores; 1 on an accelerator

    config.optimizer.frozen_layers = 8
    config.optimizer.learning_rate = 6e-4
    config.optimizer.weight_decay = 0.01
    config.optimizer.warmup_steps = 10
    config.train.epochs = 1.0
    config.train.evaluate_every = 100
    config.train.checkpoint_every = 100
    return config
