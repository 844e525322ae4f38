"""Attention over packed rows: the one mask, and the back ends that compute it."""
