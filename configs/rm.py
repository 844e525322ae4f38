"""A reward model of a few million parameters on the HelpSteer rows that ship in the package; minutes on two cores."""

from steerjax.config import default_config


def get_config():
    config = default_config()
    # HelpSteer has responses that stand twice under a prompt: two samples of one model, rated apart.
    config.data.on_duplicate = "keep"

    config.model.hidden_size = 256
    config.model.intermediate_size = 768
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.num_kv_heads = 2

    config.batch.rows = 4
    config.batch.row_length = 2560

    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 10

    config.train.epochs = 8
    config.train.evaluate_every = 20
    config.train.checkpoint_every = 40
    return config
