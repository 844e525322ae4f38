"""What the compiled train step holds: no gathered table, no [B, T, V], one layer at a time, however many layers."""

import importlib.util
import math
import re
import subprocess
import sys
import time
from dataclasses import replace

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from steerjax.config import resolve
from steerjax.errors import ConfigError
from steerjax.models.config import LoraConfig, ModelConfig
from steerjax.parallel.mesh import MeshConfig
from steerjax.planning.compile import compile_step, plannable, used_bytes, work_facts
from steerjax.planning.hlo import work
from steerjax.planning.topology import parse_topology
from steerjax.training.config import Experiment
from tests.refusals import refused

VOCABULARY, WIDTH = 1136, 48  # numbers that no other dimension has
GROUPS = {
    "model": {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 112, "num_layers": 2, "num_heads": 4,
        "num_kv_heads": 2, "tie_word_embeddings": False,
    },
    "batch": {"rows": 8, "row_length": 256},
    "compute": {
        "remat": "full", "attention": "chunked", "attention_chunk": 128, "loss_chunk": 32,
    },
}  # fmt: skip
TINY = resolve(GROUPS)
MODEL = TINY.model


def shapes(text: str) -> set[tuple[int, ...]]:
    """Dimensions of every array that a program names, on one device."""
    found = set(re.findall(r"\b(?:pred|[a-z]+\d+\w*)\[([\d,]*)\]", text))
    return {tuple(int(size) for size in dimensions.split(",") if size) for dimensions in found}


def tiny(mesh: tuple[int, ...], experiment: Experiment = TINY, **changes) -> Experiment:
    return plannable(replace(experiment, mesh=MeshConfig(*mesh), **changes), 8)


@pytest.mark.parametrize("mesh", [(1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2)], ids=str)
def test_a_reward_model_gathers_layers_and_never_the_table(mesh):
    compiled = compile_step(tiny(mesh), jax.devices())
    fsdp, tensor = mesh[1], mesh[2]
    shard = VOCABULARY * WIDTH // (fsdp * tensor)
    with_vocabulary = [s for s in shapes(compiled.text) if VOCABULARY in s or VOCABULARY // tensor in s]
    assert with_vocabulary
    assert all(math.prod(shape) <= shard for shape in with_vocabulary)
    gathered = [math.prod(c.shape) for c in work(compiled.text, 8).collectives if c.kind == "all-gather"]
    assert max(gathered) <= max(MODEL.block_parameters, 8 * 256)  # a layer, or the tokens
    assert compiled.used > compiled.parts["argument"] > 12 * compiled.parameters / 8


def test_the_work_of_a_step():
    """remat computes all but a layer's last product again; weights are gathered for both passes, and no more."""
    compiled = compile_step(tiny((1, 8, 1, 1)), jax.devices())
    work, layers, tokens = compiled.work, MODEL.num_layers, 8 * 256
    again = 2 * tokens * layers * (MODEL.block_parameters - 112 * WIDTH)
    assert 8 * work.recomputed > again - 2 * tokens * layers * 2 * WIDTH  # attention's come on top; norms have none
    assert compiled.products == compiled.flops < 8 * work.flops < 2 * compiled.flops
    gathered = sum(c.received for c in work.collectives if c.kind == "all-gather")
    assert gathered <= 2 * 4 * layers * MODEL.block_parameters * 7 / 8 + 8 * 256 * 4 * 8
    said = work_facts(compiled, 8)
    assert "times the model's" in said["compiled FLOPs"]
    assert "all-gather" in said["collectives"]


def test_a_chat_model_never_holds_the_logits_of_a_row():
    compiled = compile_step(tiny((2, 2, 2, 1), resolve(GROUPS | {"objectives": ("sft",)})), jax.devices())
    logits = [s for s in shapes(compiled.text) if VOCABULARY // 2 in s or VOCABULARY in s]
    chunk = 2 * 32 * VOCABULARY  # rows of a device, tokens of a chunk
    head = WIDTH * VOCABULARY // 2  # its kernel, gathered over fsdp and cut over tensor
    assert max(math.prod(shape) for shape in logits) <= max(chunk, head) < 2 * 256 * VOCABULARY // 2


@pytest.fixture
def no_compile_cache():
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # jax asks once whether there is one
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.mark.slow
def test_compile_time_does_not_grow_with_layers(no_compile_cache):
    """CPU seconds, the better of two."""
    seconds, length = {}, {}
    for layers in (2, 32, 2, 32):
        experiment = tiny((1, 8, 1, 1), model=replace(MODEL, num_layers=layers))
        jax.clear_caches()
        start = time.process_time()
        text = compile_step(experiment, jax.devices()).text
        seconds[layers] = min(seconds.get(layers, 1e9), time.process_time() - start)
        length[layers] = len(text)
    assert seconds[32] < 1.3 * seconds[2], seconds
    assert length[32] < 1.05 * length[2]


@pytest.mark.slow
def test_adapters_have_the_optimizers_state_alone():
    """Arguments are the parameters once, and two moments of adapters and head."""
    sizes = {}
    for rank in (0, 4):
        model = replace(MODEL, lora=LoraConfig(rank=rank))
        sizes[rank] = compile_step(tiny((8, 1, 1, 1), model=model), jax.devices()).parts["argument"]
    assert sizes[4] < 0.5 * sizes[0]


def test_layers_that_are_not_kept_are_not_planned():
    assert tiny((1, 1, 1, -1), model=replace(MODEL, source="some/model", keep_layers=1)).model.num_layers == 1
    assert tiny((1, 1, 1, -1)).model.num_layers == MODEL.num_layers


def test_what_cannot_be_planned_is_said_before_it_is_compiled():
    with refused(ConfigError, "data 1", "fsdp 3", "8 devices"):
        tiny((1, 3, 1, 1))
    with refused(ConfigError, "rows", "micro_batches", "4", "fsdp", "8"):
        compile_step(tiny((1, 8, 1, 1), batch=replace(TINY.batch, micro_batches=2)), jax.devices())
    with refused(ConfigError, "kv_heads 2", "8"):
        compile_step(tiny((1, 1, 8, 1)), jax.devices())
    with refused(ConfigError, "cache_frozen"):
        plannable(replace(TINY, compute=replace(TINY.compute, cache_frozen=True)), 8)


tpu_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def assert_plan(repository, folder, config: str, topology: str, tensor: int, model: ModelConfig, *flags: str) -> str:
    """Runs the command in a process of its own; the step fits, holds no table and gathers a layer at a time."""
    file = folder / "program.txt"
    command = [sys.executable, "-m", "steerjax.plan", "--config", f"configs/{config}", "--topology", topology]
    done = subprocess.run([*command, "--text", file, *flags], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    text, devices = file.read_text(), parse_topology(topology).devices
    vocabulary = (model.vocab_size, model.vocab_size // tensor)
    tables = [math.prod(s) for s in shapes(text) if any(v in s for v in vocabulary)]
    gathered = [math.prod(c.shape) for c in work(text, devices).collectives if c.kind == "all-gather"]
    assert max(tables) == model.vocab_size * model.hidden_size // devices
    assert max(gathered) <= model.block_parameters
    return done.stdout


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (30.50G) exceeds available HBM (15.75G). HLO module: jit_train_step.",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 30.50G of 15.75G hbm. Exceeded by 14.75G.",
    ],
)
def test_a_program_that_is_too_large_for_the_compiler(message):
    assert used_bytes(RuntimeError(message)) == 30.5 * 2**30
    with pytest.raises(RuntimeError, match="INTERNAL"):
        used_bytes(RuntimeError("INTERNAL: something else"))


@pytest.mark.tpu_compiler
@tpu_compiler
def test_8b_for_v5e_16(repository, tmp_path):
    """The step of configs/rm_llama3_8b.py, with short rows."""
    model = ModelConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_heads=32, num_kv_heads=8)
    report = assert_plan(repository, tmp_path, "rm_llama3_8b.py", "v5e:4x4", 1, model, "--config.batch.row_length=512")
    assert "verdict: fits v5e:4x4 (16 devices)" in report
    assert "parameters  7,504,945,152" in report


@pytest.mark.tpu_compiler
@pytest.mark.slow
@tpu_compiler
def test_70b_for_v5p_256(repository, tmp_path):
    """STEERJAX_SLOW=1 python -m pytest -m slow tests/planning"""
    model = ModelConfig(vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_heads=64, num_kv_heads=8)
    report = assert_plan(repository, tmp_path, "rm_llama3_70b.py", "v5p:4x4x8", 8, model)
    assert "verdict: fits v5p:4x4x8 (128 devices)" in report
