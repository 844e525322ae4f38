"""HelpSteer3-Preference: scaled Bradley-Terry with a head of its own (arXiv 2505.11475), on a model of your size.

The paper starts from Llama-3.3-70B-Instruct. What is public of its training is the loss, the data and the head at the
end of the response; rate, warm-up and batch here are HelpSteer2-Preference's. Not run here: it wants the hub.
"""

from steerjax.config import default_config


def get_config():
    config = default_config()
    config.objectives = ("bradley_terry",)
    config.bradley_terry.loss = "scaled"

    config.data.train = ("data/helpsteer3_train.jsonl",)  # the hub's HelpSteer3, folder preference/, as it is
    config.data.validation = ("data/helpsteer3_validation.jsonl",)
    config.data.on_bad_row = "skip"  # counts and lists what is no pair

    config.model.source = "meta-llama/Llama-3.1-8B-Instruct"
    config.chat.template = "llama3"
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.compute.remat = "full"
    config.batch.rows = 16
    config.batch.row_length = 4096

    config.optimizer.learning_rate = 1e-6
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 10
    config.train.epochs = 1.0
    config.train.evaluate_every = 100
    config.train.checkpoint_every = 50
    return config
