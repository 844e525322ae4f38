"""steerjax: SteerLM in JAX. Reward models that predict human ratings, and chat models steered by them."""

__version__ = "0.2.0.dev0"
