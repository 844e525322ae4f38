"""Attention over packed rows: one mask, one function, and the back ends that compute it. Start at backends.py."""

from steerjax.models.attention.backends import Choice, Plan, choose_backend, make_plan, self_attention  # noqa: F401
from steerjax.models.attention.kernels import CUDNN_FORWARD  # noqa: F401
from steerjax.models.attention.mask import ATTENTION, Cache, Window, cached_attention, seen_mean  # noqa: F401
