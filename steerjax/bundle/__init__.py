"""A model with all it needs: the one way to find, describe, open and build one, ours or Hugging Face's."""

from steerjax.bundle.bundle import Bundle, open_bundle
from steerjax.bundle.describe import describe, locate

__all__ = ["Bundle", "describe", "locate", "open_bundle"]
