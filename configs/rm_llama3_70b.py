"""HelpSteer2's reward model: Llama 3 70B, five ratings (arXiv 2406.08673, section 3 and appendix H).

From the paper: 2 epochs of HelpSteer2, 128 responses a step, AdamW, constant 2e-6 after 10 warm-up steps, squared error
on the state at the response's last token. Not in the paper's text: weight decay 0.1 and betas 0.9, 0.98, which are
NeMo-Aligner's (`training_rm.yaml`). Different here: we count packed rows, in which a prompt stands once; 16 rows of
4096 tokens hold about 128 responses. Five outputs, not nine of which four are never trained.

So small a batch cannot be cut over many chips: 16 rows over fsdp, and the rest of the machine goes to tensor. Planned
for a v5p-256:

    python -m steerjax.plan --config configs/rm_llama3_70b.py --topology v5p:4x4x8

Train from the published weights with --config.model.source=meta-llama/Meta-Llama-3-70B; its architecture is what stands
here, so that a plan needs no download.
"""

from steerjax.config import default_config


def get_config():
    config = default_config()
    config.data.train = ("data/helpsteer2_train.jsonl",)  # python -m steerjax.prepare helpsteer2
    config.data.validation = ("data/helpsteer2_validation.jsonl",)

    config.model.vocab_size = 128256
    config.model.hidden_size = 8192
    config.model.intermediate_size = 28672
    config.model.num_layers = 80
    config.model.num_heads = 64
    config.model.num_kv_heads = 8
    config.model.max_position_embeddings = 8192
    config.model.rope_theta = 500_000.0
    config.model.tie_word_embeddings = False

    config.mesh.data = 1
    config.mesh.fsdp = 16
    config.mesh.tensor = -1
    config.compute.remat = "dots"  # a v5p-256 has room for it: no product is computed again

    config.batch.rows = 16
    config.batch.row_length = 4096

    config.optimizer.learning_rate = 2e-6
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 10

    config.train.epochs = 2.0
    config.train.evaluate_every = 50
    config.train.checkpoint_every = 50
    return config
