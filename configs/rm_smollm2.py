"""A reward model from SmolLM2-135M-Instruct on the HelpSteer rows that ship in the package."""

from steerjax.config import default_config


def get_config():
    config = default_config()
    config.data.on_duplicate = "keep"
    config.data.validation_fraction = 0.2
    config.data.control_strings = "escape"

    config.chat.template = "chatml"
    config.model.source = "HuggingFaceTB/SmolLM2-135M-Instruct"

    config.batch.rows = 4
    config.batch.row_length = 2048

    config.optimizer.frozen_layers = 30
    config.compute.cache_frozen = True
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "constant"
    config.train.epochs = 10.0
    config.train.evaluate_every = 20
    return config
