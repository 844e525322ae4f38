"""Llama in Flax Linen: thin modules over pure functions."""
