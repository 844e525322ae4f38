"""HelpSteer2's reward model with Llama 3 8B in place of the 70B: the small sibling of rm_llama3_70b.py.

Same data, schedule and batch (arXiv 2406.08673, section 3 and appendix H): 16 packed rows of 4096 tokens hold about 128
responses. The learning rate is not from the paper, which trained no 8B: within the range that it searched for the 70B,
at its upper end, as usual for a smaller model. Planned for a v5e-16:

    python -m steerjax.plan --config configs/rm_llama3_8b.py --topology v5e:4x4

Train from the published weights with --config.model.source=meta-llama/Meta-Llama-3-8B; its architecture is what stands
here, so that a plan needs no download.
"""

from steerjax.config import default_config


def get_config():
    config = default_config()
    config.data.train = ("data/helpsteer2_train.jsonl",)  # python -m steerjax.prepare helpsteer2
    config.data.validation = ("data/helpsteer2_validation.jsonl",)

    config.model.vocab_size = 128256
    config.model.hidden_size = 4096
    config.model.intermediate_size = 14336
    config.model.num_layers = 32
    config.model.num_heads = 32
    config.model.num_kv_heads = 8
    config.model.max_position_embeddings = 8192
    config.model.rope_theta = 500_000.0
    config.model.tie_word_embeddings = False

    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.compute.remat = "full"

    config.batch.rows = 16
    config.batch.row_length = 4096

    config.optimizer.learning_rate = 5e-6
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 10

    config.train.epochs = 2.0
    config.train.evaluate_every = 50
    config.train.checkpoint_every = 50
    return config
