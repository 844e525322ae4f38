"""What a run's program says of itself."""

import jax
import pytest

from steerjax.config import resolve
from steerjax.parallel.mesh import make_mesh
from steerjax.training.input import make_feeder
from steerjax.training.program import Program, make_objectives

pytestmark = pytest.mark.short


@pytest.mark.parametrize(
    ("objective", "optimizer", "tied", "trained"),
    [
        ("sft", {}, True, True),
        ("sft", {"frozen_layers": 1}, True, False),  # the embedding is frozen, and is the head
        ("sft", {"frozen_layers": 1}, False, True),
        ("regression", {"frozen_layers": 1}, True, True),
        ("regression", {"frozen": ("reward_head",)}, True, False),
    ],
)
def test_a_frozen_head_has_no_gradient_in_model_flops(objective, optimizer, tied, trained):
    model = {"vocab_size": 512, "tie_word_embeddings": tied}
    e = resolve({"objectives": (objective,), "model": model, "optimizer": optimizer | {"warmup_steps": 0}})
    mesh, schema = make_mesh(e.mesh, jax.devices()[:1]), e.data.make_schema()
    objectives = make_objectives(e, schema, None)
    program = Program(e, schema, objectives, mesh, make_feeder((), objectives, e.batch.row_length, mesh, 1), 1)
    head = e.model.hidden_size * (512 if objective == "sft" else len(schema))
    assert program.flops(100, 0, 100) - program.flops(100, 0, 0) == (6 if trained else 4) * 100 * head
