"""steerjax plan --config configs/rm_llama3_70b.py --topology v5p:4x4x8 [--config.KEY=VALUE ...]

Compiles the real train step for a machine that is not here (v5e, v5p, v6e with libtpu; h100 with jax's CUDA plugin) and
prints what the compiler says: memory a device, fits or not, compiled FLOPs beside the model's, memory traffic and
collectives. Where the step does not fit, changes are tried until it does. No data and no weights are read. A config
with model.vocab_size is planned as written; without it, the model source's config.json is read. Exit status: 0 if it
fits as it is, 1 if only with changes or not at all, 2 on an error.

TOPOLOGY is v5e:4x4, v5p:4x4x8, v6e:4x4 (chips along each axis of the slice) or h100:1x8 (nodes x GPUs).
JAX_PLATFORMS=cpu, TPU_SKIP_MDS_QUERY=1 and others are set for a TPU; JAX_PLATFORMS= and others for a GPU.
"""

from __future__ import annotations

import itertools
import sys

from absl import flags

from steerjax.files import write_text
from steerjax.flags import run_experiment


def plan(experiment, topology_name: str, search: bool, text: str | None) -> int:
    """Prints the plan; the exit status."""
    from steerjax.planning import compile, topology

    machine = topology.parse_topology(topology_name)
    topology.prepare_environment(machine)
    tries = compile.find_cure(experiment, topology.topology_devices(machine), machine.chip.hbm_bytes)
    attempts = []
    for attempt in itertools.islice(tries, None if search else 1):
        attempts.append(attempt)
        print(compile.attempt_text(attempt, machine) + "\n", flush=True)
    changes, _, last = attempts[-1]
    if text:
        write_text(text, last.text)
    print(compile.verdict_text(attempts, machine))
    return 0 if not changes and last.fits(machine.chip.hbm_bytes) else 1


def main() -> None:
    topology = flags.DEFINE_string("topology", None, "The machine: v5e:4x4, v5p:4x4x8, v6e:4x4, h100:1x8.")
    search = flags.DEFINE_bool("search", True, "Try changes where it does not fit; each is one more compilation.")
    text = flags.DEFINE_string("text", None, "Write the compiled program (the last that was tried) to this file.")

    def run(experiment) -> None:
        sys.exit(plan(experiment, topology.value, search.value, text.value))

    run_experiment(run, __doc__, required=("topology",))


if __name__ == "__main__":
    main()
