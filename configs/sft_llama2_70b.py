"""The HelpSteer paper's chat model: Llama-2-70B on OpenAssistant conversations with predicted ratings.

Source: HelpSteer (arXiv 2311.09528), section 4: 800 steps of 128 conversations (about two epochs), constant learning
rate 5e-6, AdamW. The ratings are those of configs/rm_llama2_13b.py:

    python -m steerjax.prepare oasst --input 2023-04-12_oasst_all.trees.jsonl.gz --output oasst.jsonl
    python -m steerjax.annotate --model RM --input oasst.jsonl --output oasst_annotated.jsonl

A row is 4096 tokens and holds several conversations: with the sample's mean of about 480 tokens a conversation, 16 rows
have about 128.
"""

from steerjax.config import default_config


def get_config():
    config = default_config()
    config.objectives = ("sft",)
    config.data.train = ("oasst_annotated.jsonl",)
    config.data.validation_fraction = 0.05
    config.data.schema = "steerlm"
    config.data.on_bad_row = "skip"

    config.chat.template = "extra_id"
    config.model.source = "meta-llama/Llama-2-70b-hf"
    config.sft.ratings = "predicted"
    config.sft.default_ratings = {
        "quality": 4.0, "toxicity": 0.0, "humor": 0.0, "creativity": 0.0, "helpfulness": 4.0, "correctness": 4.0,
        "coherence": 4.0, "complexity": 4.0, "verbosity": 4.0,
    }  # fmt: skip

    config.batch.rows = 16
    config.batch.row_length = 4096
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.compute.remat = "full"

    config.optimizer.learning_rate = 5e-6
    config.optimizer.schedule = "constant"
    config.optimizer.weight_decay = 0.01
    config.train.steps = 800
    config.train.evaluate_every = 200
    config.train.checkpoint_every = 200
    return config
