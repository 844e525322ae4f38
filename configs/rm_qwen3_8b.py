"""A reward model on HelpSteer2 from Qwen3 8B, with RewardBench 2's advice for rate and length.

An instruct model as the source, 3e-6, one epoch. Not run here; tiny Qwen 3 models are held to transformers by tests.
"""

from steerjax.config import default_config


def get_config():
    config = default_config()
    config.data.train = ("data/helpsteer2_train.jsonl",)  # python -m steerjax.prepare helpsteer2
    config.data.validation = ("data/helpsteer2_validation.jsonl",)

    config.model.source = "Qwen/Qwen3-8B"
    config.chat.template = "source"  # its own

    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.compute.remat = "full"
    config.batch.rows = 16
    config.batch.row_length = 4096

    config.optimizer.learning_rate = 3e-6
    config.optimizer.schedule = "cosine"
    config.optimizer.min_learning_rate = 3e-7
    config.optimizer.warmup_steps = 10
    config.train.epochs = 1.0
    config.train.evaluate_every = 50
    config.train.checkpoint_every = 50
    return config
