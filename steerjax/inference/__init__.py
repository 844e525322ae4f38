"""Decoding: a key-value cache, a sampler, batches under one jit, and the same against a server."""
