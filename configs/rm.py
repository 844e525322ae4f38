"""A small reward model on the HelpSteer rows that ship in the package; a few minutes on two cores.

From random parameters and some 300 rated responses it can learn at best what a response's length says of its
complexity and verbosity. The choices below are about that: frozen embeddings, because trained ones learn the training
prompts by heart, and attention biases, with which attention by distance need not go through the tokens.
"""

from steerjax.config import default_config


def get_config():
    config = default_config()
    config.data.validation_fraction = 0.25

    config.model.hidden_size = 256
    config.model.intermediate_size = 768
    config.model.num_layers = 2
    config.model.num_heads = 4
    config.model.num_kv_heads = 4
    config.model.attention_bias = True
    config.model.initializer_range = 0.05

    config.batch.rows = 4
    config.batch.row_length = 2560  # tokens; the longest row of the sample has 2128

    # From so few rows helpfulness, correctness and coherence are mostly noise to this model; at full weight it fits it.
    config.regression.attribute_weights = {"helpfulness": 0.5, "correctness": 0.5, "coherence": 0.5}

    config.optimizer.frozen = ("embedding",)
    config.optimizer.learning_rate = 3e-3
    config.optimizer.epsilon = 1e-3  # near the size of most gradients: with a tiny one Adam steps on their noise

    config.train.steps = 56
    config.train.evaluate_every = 8
    config.train.checkpoint_every = 28
    return config
