"""Peak resident memory of export and import, on a synthetic model of about 6 GB, beside the bound.

    python benchmarks/hf_memory.py --folder SCRATCH

The bound for an export is twice the largest shard and 1.5 GiB, whatever the model's size; an import may hold the
parameters besides. Each part runs in a fresh process, which reports its own VmHWM. Needs three times --gigabytes of
disk under --folder; everything is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

MARGIN = 1.5 * 2**30
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def resident_peak() -> int:
    """Bytes; what this process ever held at once, mapped files included."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def make(folder: Path, gigabytes: float, shard_size: str) -> None:
    """A folder with random weights, written by our exporter from a generator of random tensors."""
    from steerjax.chat.tokenizer import EMBEDDED
    from steerjax.hf.config_json import parse_config
    from steerjax.hf.export import write_model
    from steerjax.hf.keys import CAUSAL_LM, stacked_shapes, tensors

    one = parse_config(CONFIG | {"num_hidden_layers": 1}).model
    ends = 2 * one.vocab_size * one.hidden_size
    layers = max(1, round((gigabytes * 1e9 / 4 - ends) / one.block_parameters))
    config = parse_config(CONFIG | {"num_hidden_layers": layers})
    random = np.random.default_rng(0)
    shapes = stacked_shapes(tensors(config.model, CAUSAL_LM))

    def read(path, index, dtype):
        return random.standard_normal([part.stop - part.start for part in index], np.float32)

    reader = SimpleNamespace(shapes=shapes, dtypes=dict.fromkeys(shapes, "float32"), read=read)
    folder.mkdir(parents=True)
    write_model(folder, config, reader, "auto", shard_size)
    shutil.copyfile(EMBEDDED, folder / "tokenizer.model")


def import_folder(source: Path, save_to: Path | None) -> int:
    """Into the shards of the devices there are; saved as a checkpoint where asked. Returns the parameters' bytes."""
    import dataclasses

    import jax

    from steerjax import __version__
    from steerjax.bundle import open_bundle
    from steerjax.bundle.describe import Provenance, TokenizerSource
    from steerjax.bundle.store import CheckpointStore

    bundle = open_bundle(source, template="extra_id")
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(bundle.params))
    if save_to is not None:
        about = bundle.description
        provenance = Provenance(
            steerjax=__version__, kind="chat", objectives=("sft",), attributes=(), model=about.model,
            template="extra_id", system_prompt=None, readout="last", base_model=str(source), data={}, config={},
            tokenizer=TokenizerSource("embedded", about.tokenizer.hash),
        )  # fmt: skip
        with CheckpointStore(save_to / "checkpoints", 1) as store:
            store.save(bundle.params, {"step": np.zeros((), np.int32)}, 1, dataclasses.asdict(provenance), None)
    return size


def export_model(source: Path, output: Path, dtype: str, shard_size: str) -> int:
    from steerjax.export import export

    export(str(source), output, dtype=dtype, max_shard_size=shard_size)
    return 0


def run_part(options: argparse.Namespace) -> None:
    """Runs in a process of its own; prints what it measured as JSON."""
    folder, start = options.folder, time.perf_counter()
    source, run, output = folder / "source", folder / "run", folder / options.part
    held = {
        "import": lambda: import_folder(source, None),
        "save": lambda: import_folder(source, run),
        "folder-to-folder": lambda: export_model(source, output, "auto", options.shard),
        "folder-to-bfloat16": lambda: export_model(source, output, "bfloat16", options.shard),
        "checkpoint-to-folder": lambda: export_model(run, output, "float32", options.shard),
    }[options.part]()
    print(json.dumps({"peak": resident_peak(), "held": held, "seconds": time.perf_counter() - start}))


def measure(options: argparse.Namespace, part: str) -> dict:
    command = [sys.executable, __file__, "--folder", str(options.folder), "--shard", options.shard, "--part", part]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{part} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="scratch; must not exist")
    parser.add_argument("--gigabytes", type=float, default=6.0)
    parser.add_argument("--shard", default="500MB")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        run_part(options)
        return
    options.folder.mkdir(parents=True)
    try:
        source = options.folder / "source"
        make(source, options.gigabytes, options.shard)
        shards = [file.stat().st_size for file in source.glob("*.safetensors")]
        print(f"{sum(shards) / 1e9:.2f} GB in {len(shards)} files, the largest {max(shards) / 1e6:.0f} MB", flush=True)
        bound = 2 * max(shards) + MARGIN
        print(f"{'':>22} {'peak GiB':>9} {'bound GiB':>9} {'ratio':>6} {'seconds':>8}")
        for part in ("import", "folder-to-folder", "folder-to-bfloat16", "save", "checkpoint-to-folder"):
            found = measure(options, part)
            limit = bound + found["held"] if part != "save" else float("nan")
            row = (found["peak"] / 2**30, limit / 2**30, found["peak"] / limit, found["seconds"])
            print(f"{part:>22} {row[0]:9.2f} {row[1]:9.2f} {row[2]:6.2f} {row[3]:8.1f}", flush=True)
            shutil.rmtree(options.folder / part, ignore_errors=True)
    finally:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
