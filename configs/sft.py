"""A small chat model conditioned on ratings, on the HelpSteer rows that ship in the package; minutes on two cores.

From random parameters and 300 responses it learns the shape of a conversation and little of the language: this shows
that the pieces fit. configs/sft_smollm2.py starts from a pretrained model.
"""

from steerjax.config import default_config


def get_config():
    config = default_config()
    config.objectives = ("sft",)
    config.data.validation_fraction = 0.25

    config.model.hidden_size = 256
    config.model.intermediate_size = 768
    config.model.num_layers = 2
    config.model.num_heads = 4
    config.model.num_kv_heads = 4

    config.sft.default_ratings = {
        "helpfulness": 4.0, "correctness": 4.0, "coherence": 4.0, "complexity": 2.0, "verbosity": 2.0,
    }  # fmt: skip
    config.batch.rows = 4
    config.batch.row_length = 2560  # tokens; the longest row of the sample has 2155

    config.optimizer.learning_rate = 3e-3
    config.optimizer.weight_decay = 0.01

    config.train.steps = 60
    config.train.evaluate_every = 20
    config.train.checkpoint_every = 30
    return config
