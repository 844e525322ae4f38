"""HelpSteer's reward model: Llama 2 13B, nine ratings from OASST and HelpSteer together (arXiv 2311.09528, section 4).

From the paper: both data sets in one run, nine attributes of which each row has its own (schema steerlm), 800 steps of
128 examples (about 2 epochs), AdamW, constant 5e-6, validation every 200 steps. Not in the paper's text: weight decay
0.1 and betas 0.9, 0.98, which are NeMo-Aligner's (`training_rm.yaml`; its documentation trains this model with 512
examples and a cosine from 9e-6 to 9e-7). Different here: we count packed rows, in which a prompt stands once; 8 rows of
4096 tokens hold about 128 responses.

    python -m steerjax.prepare oasst --input oasst.jsonl.gz --output data/oasst_train.jsonl
    python -m steerjax.prepare helpsteer --input helpsteer.jsonl.gz --output data/helpsteer_train.jsonl

and the same for validation. Planned for a v6e-16:

    python -m steerjax.plan --config configs/rm_llama2_13b.py --topology v6e:4x4

Train from the published weights with --config.model.source=meta-llama/Llama-2-13b-hf; its architecture is what stands
here, so that a plan needs no download.
"""

from steerjax.config import default_config


def get_config():
    config = default_config()
    config.data.train = ("data/oasst_train.jsonl", "data/helpsteer_train.jsonl")
    config.data.validation = ("data/oasst_validation.jsonl", "data/helpsteer_validation.jsonl")
    config.data.schema = "steerlm"

    config.model.vocab_size = 32000
    config.model.hidden_size = 5120
    config.model.intermediate_size = 13824
    config.model.num_layers = 40
    config.model.num_heads = 40
    config.model.num_kv_heads = 40
    config.model.max_position_embeddings = 4096
    config.model.tie_word_embeddings = False

    config.mesh.data = 1
    config.mesh.fsdp = 8
    config.mesh.tensor = -1
    config.compute.remat = "full"

    config.batch.rows = 8
    config.batch.row_length = 4096

    config.optimizer.learning_rate = 5e-6
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 0

    config.train.steps = 800
    config.train.evaluate_every = 200
    config.train.checkpoint_every = 200
    return config
