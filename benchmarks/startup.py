"""From the command to its help, to the first step, and from a folder of weights to parameters.

    python benchmarks/startup.py [--folder SCRATCH] [--turns 5]

`--help` of every command. `train` of a recipe, one step, in a fresh folder with an empty compile cache and once more
with a full one: seconds to each of its phases. A random Llama of 1.2 billion parameters, in bfloat16 and in float32
(7.5 GB in --folder, which go at the end): opened, and exported again, beside a plain read of its file, all with the
file in the page cache; --cold drops it from there before each. Every measurement is a process of its own. Writes
results/startup.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from turns import REPOSITORY, RESULTS, machine, peak_gib

from steerjax.__main__ import COMMANDS

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "hidden_size": 2048,
    "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
STEP = (
    "--config.train.steps=1", "--config.train.plots=False", "--config.data.train=('embedded:helpsteer2',)",
    "--config.batch.rows=1", "--config.optimizer.warmup_steps=0",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--folder", type=Path, help="with 10 GB of room; default: a temporary one")
    add("--turns", type=int, default=5)
    add("--cold", action="store_true", help="drop files from the page cache before they are read")
    add("--only", choices=("help", "first_step", "weights"), help="leave the others out")
    add("--worker", nargs=3, metavar=("NAME", "FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.worker:
        name, folder, dtype = o.worker
        print(json.dumps(globals()[name](Path(folder), dtype)))
        return
    value: dict = {"benchmark": "startup", "machine": machine()}
    with tempfile.TemporaryDirectory(dir=o.folder) as scratch:
        scratch = Path(scratch)
        for part, measure in (("help", helps), ("first_step", first_steps), ("weights", weights)):
            if o.only in (None, part):
                value[part] = measure(scratch, o)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "startup.json").write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def helps(scratch: Path, o) -> dict:
    """Seconds of each command's --help: median, least, greatest."""
    found = {}
    for name in COMMANDS:
        times = []
        for _ in range(o.turns):
            begun = time.perf_counter()
            run("-m", "steerjax", name, "--help")
            times.append(time.perf_counter() - begun)
        found[name] = {"median": statistics.median(times), "least": min(times), "greatest": max(times)}
        print(f"{name + ' --help':28}{found[name]['median']:8.2f} s [{min(times):.2f}, {max(times):.2f}]", flush=True)
    return found


def first_steps(scratch: Path, o) -> dict:
    """Seconds from the command to each phase that `train` says, and to its end, with an empty and a full cache."""
    found = {}
    for name in ("empty cache", "full cache"):
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(scratch / "cache"), "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "steerjax", "train", "--config", "rm", *STEP, "--workdir", str(scratch / name)]
        begun, seen = time.perf_counter(), {}
        process = subprocess.Popen(command, env=environment | path(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True)  # fmt: skip
        lines = []
        for line in process.stdout:
            lines.append(line)
            for phase in ("reading and packing the data", "making parameters", "compiling the step", "step 1/1"):
                if phase in line:
                    seen.setdefault(phase, time.perf_counter() - begun)
        if process.wait():
            sys.exit("".join(lines))
        found[name] = seen | {"end": time.perf_counter() - begun}
        print(f"{name:28}" + ", ".join(f"{phase} {at:.1f} s" for phase, at in found[name].items()), flush=True)
    return found


def weights(scratch: Path, o) -> dict:
    """Seconds, GB of the file a second, and peak memory of a plain read, opening and exporting."""
    found = {}
    for dtype in ("bfloat16", "float32"):
        folder = scratch / dtype
        run(__file__, "--worker", "make", str(folder), dtype)
        jobs = [("read_file", dtype), *(("open_folder", kind) for kind in ("bfloat16", "float32")), ("export", dtype)]
        for name, kind in jobs:
            if o.cold:
                with (folder / "model.safetensors").open("rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            one = json.loads(run(__file__, "--worker", name, str(folder), kind))
            what = f"{dtype}: {name} {kind}"
            found[what] = one
            print(
                f"{what:36}{one['seconds']:8.2f} s{one['gb_a_second']:8.2f} GB/s{one['peak_gib']:8.2f} GiB", flush=True
            )
        shutil.rmtree(folder)
    return found


def make(folder: Path, dtype: str) -> dict:
    """A folder with random weights, written by our exporter."""
    import numpy as np

    from steerjax.chat.tokenizer import load_tokenizer
    from steerjax.hf.config_json import parse_config
    from steerjax.hf.export import write_model
    from steerjax.hf.keys import CAUSAL_LM, stacked_shapes, tensors

    config = parse_config(CONFIG | {"torch_dtype": dtype})
    block = np.random.default_rng(0).standard_normal(1 << 22, np.float32)
    shapes = stacked_shapes(tensors(config.model, CAUSAL_LM))
    reader = SimpleNamespace(
        shapes=shapes, dtypes=dict.fromkeys(shapes, dtype), directory=folder,
        read=lambda path, index, kind: np.resize(block, [part.stop - part.start for part in index]).astype(kind),
    )  # fmt: skip
    folder.mkdir()
    write_model(folder, config, reader, dtype, "99GB")
    load_tokenizer("embedded").backend.save(str(folder / "tokenizer.json"))
    return {}


def read_file(folder: Path, dtype: str) -> dict:
    """Into one buffer, again and again."""
    buffer = bytearray(1 << 24)

    def read() -> None:
        with (folder / "model.safetensors").open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    return timed(folder, read)


def open_folder(folder: Path, dtype: str) -> dict:
    import jax

    from steerjax.bundle import open_bundle

    jax.devices()
    return timed(folder, lambda: jax.block_until_ready(open_bundle(folder, template="extra_id", dtype=dtype).params))


def export(folder: Path, dtype: str) -> dict:
    from steerjax.hf.export import convert_folder

    output = folder / "exported"
    found = timed(folder, lambda: convert_folder(folder, output, dtype=dtype, max_shard_size="5GB"))
    shutil.rmtree(output)
    return found


def timed(folder: Path, work) -> dict:
    size = (folder / "model.safetensors").stat().st_size
    begun, used = time.perf_counter(), time.process_time()
    work()
    seconds, used = time.perf_counter() - begun, time.process_time() - used
    return {"seconds": seconds, "processor_seconds": used, "gb_a_second": size / seconds / 1e9, "peak_gib": peak_gib()}


def path() -> dict[str, str]:
    return {"PYTHONPATH": str(REPOSITORY)}


def run(*arguments: str) -> str:
    """What Python with these arguments prints."""
    done = subprocess.run([sys.executable, *arguments], env=os.environ | path(), capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


if __name__ == "__main__":
    main()
