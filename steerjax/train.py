"""steerjax train --config configs/rm.py [--config.KEY=VALUE ...] --workdir DIR

Trains a reward model or a chat model; run again with the same workdir, it resumes.
"""

from __future__ import annotations

from steerjax.signals import ends_at_once


def main() -> None:
    with ends_at_once():  # from the first import on
        _main()


def _main() -> None:
    from absl import flags

    from steerjax.flags import local_folder, run_experiment, use_compile_cache

    workdir = flags.DEFINE_string("workdir", None, "Folder of the run. Run again with the same folder, it resumes.")

    def run(experiment) -> None:
        from steerjax.parallel.processes import connect
        from steerjax.training.train import train

        folder = local_folder(workdir.value)
        use_compile_cache(folder)
        with connect() as processes:
            train(experiment, folder, processes)

    run_experiment(run, __doc__, required=("workdir",))


if __name__ == "__main__":
    main()
