"""A reward model on HelpSteer2 with adapters: Llama 3 8B Instruct, rank 32 on every projection (arXiv 2106.09685).

Data, attributes and loss are those of rm_llama3_8b.py. What is trained are 84 million parameters and the head; the rate
is ten times that of full training, as is usual for adapters. Not run here. What it takes of a machine:

    steerjax plan --config configs/rm_lora_llama3_8b.py --topology v5p:2x2x1

says 13.1 GiB a device of four, of which parameters and optimizer state are 4.2 (19.3 and 7.7 with the base in float32);
rm_llama3_8b.py, which trains all, has 38.4 and 21.0 there.

Train with --config.model.source=meta-llama/Meta-Llama-3-8B-Instruct; its architecture is what stands here, so that a
plan needs no download.
"""

from steerjax.config import default_config


def get_config():
    config = default_config()
    config.data.train = ("data/helpsteer2_train.jsonl",)  # python -m steerjax.prepare helpsteer2
    config.data.validation = ("data/helpsteer2_validation.jsonl",)

    config.chat.template = "llama3"
    config.model.vocab_size = 128256
    config.model.hidden_size = 4096
    config.model.intermediate_size = 14336
    config.model.num_layers = 32
    config.model.num_heads = 32
    config.model.num_kv_heads = 8
    config.model.max_position_embeddings = 8192
    config.model.rope_theta = 500_000.0
    config.model.tie_word_embeddings = False
    config.model.lora.rank = 32
    config.model.lora.alpha = 64.0
    config.model.lora.base_dtype = "bfloat16"  # as it was published

    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.compute.remat = "full"
    config.batch.rows = 16
    config.batch.row_length = 4096

    config.optimizer.learning_rate = 5e-5
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 10
    config.optimizer.weight_decay = 0.0
    config.train.epochs = 2.0
    config.train.evaluate_every = 50
    config.train.checkpoint_every = 50
    return config
