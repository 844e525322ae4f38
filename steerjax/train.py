"""python -m steerjax.train --config configs/rm.py [--config.KEY=VALUE ...] --workdir DIR

Trains a reward model or a chat model; run again with the same workdir, it resumes.
"""

from __future__ import annotations

from steerjax.command import run_command


def main(experiment, workdir) -> None:
    from steerjax.parallel.processes import connect
    from steerjax.training.loop import train

    with connect() as processes:
        train(experiment, workdir, processes)


if __name__ == "__main__":
    run_command(main, __doc__)
