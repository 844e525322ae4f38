"""Rows of any source -> conversations; examples -> trees -> packed batches. Knows nothing of models."""
