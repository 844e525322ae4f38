"""SteerLM 2.0 on a small chat model that has learnt label lines, from responses that it sampled (docs/steerlm2.md).

    steerjax train --config configs/sft_steerlm2.py --config.model.source=CHAT_MODEL --workdir runs/steerlm2

The paper (HelpSteer2, arXiv 2406.08673, section 4.5) trains a 70B model for one target (helpfulness, correctness and
coherence 4, complexity and verbosity 2): 2 epochs of 20,000 prompts with 10 responses each, 128 prompts a step, a
constant 1e-7. Ours are the learning rate, as 135M parameters need a larger one, and the size of a step, for two cores.
A row must hold all responses to a prompt.
"""

from steerjax.config import default_config


def get_config():
    config = default_config()
    config.objectives = ("steerlm2",)
    config.steerlm2.default_ratings = {
        "helpfulness": 4.0, "correctness": 4.0, "coherence": 4.0, "complexity": 2.0, "verbosity": 2.0,
    }  # fmt: skip
    config.data.train = ("groups.jsonl",)
    config.data.validation_fraction = 0.1

    config.model.source = "runs/sft"  # what has sampled the responses
    config.chat.template = "source"

    config.batch.rows = 8
    config.batch.row_length = 2048
    config.batch.micro_batches = 8  # on two cores; 1 on an accelerator

    config.optimizer.learning_rate = 1e-5
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 0
    config.optimizer.weight_decay = 0.01
    config.train.epochs = 2.0
    config.train.evaluate_every = 20
    config.train.checkpoint_every = 20
    return config
