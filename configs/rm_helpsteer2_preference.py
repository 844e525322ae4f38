"""HelpSteer2-Preference, the second of two stages: scaled Bradley-Terry from a regression model (arXiv 2410.01257).

From NeMo-Aligner's guide (steerlm.rst): stage 1 is `rm_llama3_70b.py` from Llama-3.1-70B-Instruct on helpfulness alone
(--config.data.attributes="(('helpfulness',0,4),)"), stage 2 one epoch of the preferences at a constant 1e-6 with the
head of stage 1, 128 responses a step. ExPO after it: `steerjax merge STAGE1 STAGE2 --factor 1.52`.

Not run here: it wants 70B parameters and the hub. The same two stages ran on SmolLM2 and the packaged rows
(docs/preferences.md).
"""

from steerjax.config import default_config


def get_config():
    config = default_config()
    config.objectives = ("bradley_terry",)
    config.bradley_terry.loss = "scaled"
    config.bradley_terry.score = {"helpfulness": 1.0}

    config.data.train = ("data/helpsteer2_preference.jsonl",)  # the hub's HelpSteer2, folder preference/, as it is
    config.data.format = "helpsteer2_preference"
    config.data.attributes = (("helpfulness", 0, 4),)
    config.data.validation_fraction = 0.05

    config.model.source = "runs/stage1"
    config.chat.template = "llama3"

    config.mesh.data = 1
    config.mesh.fsdp = 16
    config.mesh.tensor = -1
    config.compute.remat = "full"
    config.batch.rows = 16
    config.batch.row_length = 4096

    config.optimizer.learning_rate = 1e-6
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 10
    config.train.epochs = 1.0
    config.train.evaluate_every = 20
    config.train.checkpoint_every = 50
    return config
