"""Ratings and preferences on one model (SMORM, arXiv 2507.07375): SmolLM2, one file that has both.

    steerjax prepare helpsteer --input embedded:helpsteer --pairs helpfulness --least 1 --output pairs.jsonl
    steerjax train --config configs/rm_joint.py --workdir runs/joint

The score of a response is its predicted helpfulness, so that ratings and preferences train the same output. Layers and
rates are those of rm_smollm2.py.
"""

from steerjax.config import default_config


def get_config():
    config = default_config()
    config.objectives = ("regression", "bradley_terry")
    config.bradley_terry.score = {"helpfulness": 1.0}
    config.data.train = ("pairs.jsonl",)
    config.data.validation_fraction = 0.2

    config.chat.template = "chatml"
    config.model.source = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.model.keep_layers = 12
    config.optimizer.frozen_layers = 9
    config.compute.cache_frozen = True

    config.batch.rows = 4
    config.batch.row_length = 2048
    config.batch.micro_batches = 4

    config.optimizer.learning_rate = 1e-4
    config.optimizer.min_learning_rate = 1e-5
    config.optimizer.warmup_steps = 3
    config.optimizer.weight_decay = 0.01
    config.train.epochs = 3.0
    config.train.checkpoint_every = 20
    return config
