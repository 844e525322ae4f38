"""steerjax iterate --config sft_steerlm2 [--config.KEY=VALUE ...] --workdir DIR --prompts FILE --reward-model DIR
    --attributes helpfulness=4,...

SteerLM 2.0 (docs/steerlm2.md). Each iteration samples answers to the prompts, weighs them by the reward model's
ratings, and trains on them; the next one samples from what was trained. config.model.source is the first chat model,
which must have learnt label lines. Run again with the same workdir, it goes on where it was.

In WORKDIR/iteration-N are samples.jsonl, rated.jsonl, log_sampled.jsonl, log_prior.jsonl, groups.jsonl and run, a
training's folder. One machine.
"""

from __future__ import annotations

from steerjax.signals import ends_at_once

MEANINGS = {
    "prompts": "Rows to answer, in any format (docs/formats.md); answers that they end with are dropped.",
    "reward_model": "A regression reward model that predicts what is asked for: a run, a checkpoint or an export.",
    "iterations": "How often; more may be asked for later.",
    "samples": "Answers to each prompt.",
    "temperature": "Of the sampling.",
    "top_p": "Draw from the most likely tokens that add up to this.",
    "max_new_tokens": "An answer is cut there, and has no weight then: it is left out.",
    "seed": "Of the sampling; iteration N has seed + N - 1.",
    "batch_size": "Answers that are decoded together.",
    "attributes": "Ratings to ask for, as helpfulness=4,verbosity=2; others are the model's default ratings.",
    "combinations": "Rated conversations; each prompt is asked for ratings that one of the best of them has.",
    "quality": "What is best there; default quality, helpfulness or the first attribute.",
    "prior": "The model of log P(y|x). Default: the first chat model, asked without a label line: right where it saw "
    "responses without ratings in training, or else name what it was trained from, or plain SFT on the same responses.",
    "edges": "Where a rating's bin of P(a|x,y) ends: middle, half-way to the next rating, or equal parts.",
    "format": "Layout of the prompts' rows; default: told from their keys.",
    "on_bad_row": "error stops; skip leaves prompts out that cannot be used, and lists them.",
}


def main() -> None:
    with ends_at_once():  # from the first import on
        _main()


def _main() -> None:
    import dataclasses
    import os

    from absl import flags

    from steerjax.flags import local_folder, run_experiment, use_compile_cache
    from steerjax.iteration.options import Options

    workdir = flags.DEFINE_string("workdir", None, "Folder of it all. Run again with the same folder, it goes on.")
    holders = {}
    for field in dataclasses.fields(Options):
        default = None if field.default is dataclasses.MISSING else field.default
        define = {int: flags.DEFINE_integer, float: flags.DEFINE_float}.get(type(default), flags.DEFINE_string)
        said = "" if default in (None, "") else f" Default {default}."
        holders[field.name] = define(field.name.replace("_", "-"), default, MEANINGS[field.name] + said)

    def run(experiment) -> None:
        from steerjax.errors import ConfigError
        from steerjax.typed import typed

        options = typed(Options, {name: holder.value for name, holder in holders.items()}, "options", ConfigError)

        from steerjax.command import resumable_command
        from steerjax.iteration.driver import iterate
        from steerjax.parallel.cluster import find_cluster
        from steerjax.parallel.processes import connect

        if find_cluster(os.environ) is not None:
            raise ConfigError(
                "iterate runs in one process, and the environment names several; cure: one machine, without srun"
            )
        folder = local_folder(workdir.value)
        use_compile_cache(folder)
        with resumable_command(), connect():
            iterate(experiment, options, folder)

    run_experiment(run, __doc__, required=("workdir", "prompts", "reward-model"))


if __name__ == "__main__":
    main()
