"""A model with all it needs: the one way to find, describe, open and build one, ours or Hugging Face's."""

from steerjax.bundle.describe import describe, locate

__all__ = ["Bundle", "describe", "locate", "open_bundle"]


def __getattr__(name: str):
    if name not in ("Bundle", "open_bundle"):
        raise AttributeError(name)
    from steerjax.bundle import build  # with jax, which describing does without

    return getattr(build, name)
