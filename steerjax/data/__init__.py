"""Rows of any source -> conversations; prompt groups -> packed batches. Knows nothing of tokens or models."""
