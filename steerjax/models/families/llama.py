"""Llama 1 to 3.3, TinyLlama, SmolLM2."""

from steerjax.models.families.family import Family

LLAMA = Family("llama", "Llama")
