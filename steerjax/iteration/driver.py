"""`steerjax iterate`, top to bottom: prompts, then in each iteration answers, ratings, log-probabilities, training.

Each stage is a job that goes on where it was; one that is finished is not started again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pydantic.dataclasses
from scipy.stats import entropy

from steerjax.bundle import describe, locate, open_bundle
from steerjax.chat.render import make_renderer
from steerjax.checksums import folder_checksum
from steerjax.data.conversation import Conversation, Turn
from steerjax.data.loading import Skipped, file_hashes
from steerjax.data.readers import source_format
from steerjax.errors import CheckpointError, ConfigError, DataError, ModelError
from steerjax.files import make_folder, write_text
from steerjax.hf.description import Description
from steerjax.inference.annotation import annotate
from steerjax.inference.importance import read_scores, score_groups
from steerjax.inference.job import InputRow, input_rows, is_finished, resumable
from steerjax.inference.scorer import rated_schema, reading_schema
from steerjax.inference.session import Session, prompt_of, settings_of
from steerjax.inference.steering import label_of
from steerjax.iteration.groups import RatedGroup, effective_samples, rated_groups, weighed_groups, weights
from steerjax.iteration.options import Options
from steerjax.locks import only_writer
from steerjax.report.page import text_table
from steerjax.schema import Schema
from steerjax.training.config import Experiment
from steerjax.training.input import load_parts
from steerjax.training.train import train
from steerjax.training.workdir import fixed
from steerjax.typed import STRICT, read_json

OBJECTIVE = "steerlm2"
RESULT = "result.json"


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Iteration:
    """What an iteration found; WORKDIR/iteration-N/result.json.

    Attributes:
        left_out: answers without a weight.
        groups: prompts that were trained on or held out, each with at least two answers.
        effective_samples: the mean over groups of 1 / sum w'^2.
        ratings: the mean predicted ratings of the answers that came to their end.
        before, after: `distance` on the groups that are held out.
    """

    number: int
    prompts: int
    answers: int
    left_out: int
    groups: int
    effective_samples: float
    ratings: dict[str, float]
    before: float
    after: float


def iterate(experiment: Experiment, options: Options, workdir: Path) -> list[Iteration]:
    """All iterations; goes on where an earlier call with the same workdir was.

    Raises SteerjaxError: models, attributes or a config that do not fit together, a workdir of other settings, and what
    the stages raise.
    """
    check_experiment(experiment)
    make_folder(workdir)
    with only_writer(workdir, workdir / ".lock"):
        setup = prepare(experiment, options, workdir)
        found = [iteration(setup, number) for number in range(1, options.iterations + 1)]
    print("\n" + table(found), flush=True)
    return found


@dataclass(frozen=True)
class Setup:
    """What all iterations share. `experiment` is that of the first; `prompts` is what is answered."""

    experiment: Experiment
    options: Options
    workdir: Path
    first: Description
    reward: Description
    prior: Description
    prompts: Path

    def folder(self, number: int) -> Path:
        return self.workdir / f"iteration-{number}"

    def command(self, **changes) -> argparse.Namespace:
        """Options of the commands whose work the stages do."""
        e, o = self.experiment, self.options
        mesh = ",".join(f"{axis}={size}" for axis, size in dataclasses.asdict(e.mesh).items())
        shared = {"template": None, "dtype": e.compute.dtype, "mesh": mesh, "no_verify": not e.train.verify}
        return argparse.Namespace(**{**dataclasses.asdict(o), **shared, "format": "conversation", **changes})


def check_experiment(e: Experiment) -> None:
    """Raises ConfigError: a recipe of something else."""
    for holds, message in (
        (OBJECTIVE in e.objectives, f"config.objectives is {e.objectives!r}; cure: --config sft_steerlm2"),
        (e.model.source != "random", "config.model.source is 'random'; cure: a chat model that was trained on ratings"),
        (not e.model.keep_layers, "config.model.keep_layers: what samples must be what is trained; cure: 0"),
        (not e.data.validation, "config.data.validation: groups are held out of what is sampled; cure: leave it empty"),
        (OBJECTIVE not in e.objective or not e.objective[OBJECTIVE].train,
         f"config.{OBJECTIVE}.train: it learns from what is sampled; cure: leave it empty"),
    ):  # fmt: skip
        if not holds:
            raise ConfigError(message)


def prepare(e: Experiment, options: Options, workdir: Path) -> Setup:
    """Opens what all iterations share, as far as it costs little, and writes WORKDIR/prompts.jsonl.

    Raises SteerjaxError: see `iterate`.
    """
    first = describe(e.model.source, template=e.chat.template, verify=e.train.verify)
    reward, prior = (
        describe(path, template="source", verify=e.train.verify) if path else first
        for path in (options.reward_model, options.prior)
    )
    first.expect("chat")
    prior.expect("chat")
    check_rendering(e, first)
    check_asked(options, first, reward)
    if e.chat.system_prompt == "default" and first.system_prompt is not None:
        e = replace(e, chat=replace(e.chat, system_prompt=first.system_prompt))
    own = e.objective[OBJECTIVE]
    if first.default_ratings and not own.default_ratings:  # which the trained model keeps
        own = replace(own, default_ratings=first.default_ratings)
        e = replace(e, objective={**e.objective, OBJECTIVE: own})
    setup = Setup(e, options, workdir, first, reward, prior, workdir / "prompts.jsonl")
    free = ("prompts", "reward_model", "prior", "iterations", "batch_size")
    settings = {
        "command": "iterate", "input": file_hashes([options.prompts])[options.prompts],
        "reward_model": folder_checksum(reward.path), "prior": folder_checksum(prior.path),
        "combined": [*file_hashes([options.combinations] if options.combinations else []).values()],
        **{key: value for key, value in dataclasses.asdict(options).items() if key not in free},
        **{f"config.{key}": value for key, value in fixed(e.to_dict()).items()},
    }  # fmt: skip
    write_prompts(setup, settings)
    return setup


def check_rendering(e: Experiment, first: Description) -> None:
    """Raises SteerjaxError: training would not write a prompt with its label line as the first model had it."""
    if first.schema is None:
        cure = "train one on ratings first (configs/sft.py), and give that"
        raise ModelError(f"'{first.path}' does not say which attributes it takes\n  cure: {cure}")
    known = e.data.make_schema()
    if (own := _ranges(first.schema)) != _ranges(known):
        raise ConfigError(
            f'config.data: its attributes are not those of {first.path}\n  cure: --config.data.attributes="{own!r}"'
        )
    auto = str(first.tokenizer.files[0])
    chat = replace(e.chat, tokenizer=auto) if e.chat.tokenizer == "auto" else e.chat
    renderer = make_renderer(chat, known, first.template)
    if (renderer.tokenizer.hash, renderer.template) != (first.tokenizer.hash, first.template):
        raise ConfigError(
            f"config.chat is not what {first.path} was trained with; cure: 'auto' where there is such a value"
        )


def check_asked(options: Options, first: Description, reward: Description) -> None:
    """Raises SteerjaxError: nothing is asked for, or what the reward model does not predict."""
    predicted = _ranges(rated_schema(reward))
    settings, combinations = settings_of(_asking(options), first.schema)
    asked = dict.fromkeys(name for each in combinations or settings for name in label_of(each, first.default_ratings))
    if not asked:
        raise ConfigError("nothing is asked for, and the chat model has no default ratings; cure: --attributes NAME=N")
    for name, low, high in _ranges(Schema(tuple(first.schema[name] for name in asked))):
        if (name, low, high) not in predicted:
            cure = f"--attributes with {name}=none, or a reward model that predicts it"
            raise ModelError(f"'{reward.path}' does not predict {name} from {low:g} to {high:g}\n  cure: {cure}")


def write_prompts(setup: Setup, settings: dict) -> None:
    """The prompts as they are asked: each once, without answers and ratings, which rows of groups cannot carry."""
    o, schema, skipped = setup.options, reading_schema(setup.first.schema), []

    def read(row: dict, line: int) -> InputRow:
        found = prompt_of(row, schema, True, source_format(o.prompts, o.format))
        turns = tuple(Turn(turn.role, turn.content) for turn in found.turns)
        return InputRow(replace(found, turns=turns, id=found.id or f"{o.prompts}:{line}"), {})

    with resumable(setup.prompts, settings) as output:
        if not output.finished:
            rows = list(input_rows(o.prompts, read, skipped, on_bad_row=o.on_bad_row, on_duplicate="skip"))
            output.skip(skipped)
            output.add(0, [row.conversation.to_json() for row in rows])


def iteration(setup: Setup, number: int) -> Iteration:
    """One iteration, or what a finished one found."""
    e, folder = setup.experiment, setup.folder(number)
    if (folder / RESULT).exists():
        return read_json(Iteration, folder / RESULT, CheckpointError, "remove it, and the iteration is looked at again")
    sampler = setup.first
    if number > 1:  # what the last one trained samples, and is trained on
        newest = locate(setup.folder(number - 1) / "run", verify=e.train.verify)
        sampler = replace(describe(newest, verify=False), default_ratings=setup.first.default_ratings)
        e = replace(e, model=replace(e.model, source=str(newest)), chat=replace(e.chat, template="source"))
    groups, found = sample_groups(setup, e, number, sampler)
    e = replace(e, data=replace(e.data, train=(str(groups),), format="steerlm2"))
    print(f"iteration {number}: training", flush=True)
    evaluation = train(e, folder / "run")[OBJECTIVE]
    result = Iteration(number, **found, before=first_distance(e), after=evaluation.values["distance"])
    write_text(folder / RESULT, json.dumps(dataclasses.asdict(result), indent=2) + "\n")
    return result


def sample_groups(setup: Setup, e: Experiment, number: int, sampler: Description) -> tuple[Path, dict[str, Any]]:
    """groups.jsonl of an iteration, and what is to be said of it (see `Iteration`)."""
    o, schema, folder = setup.options, rated_schema(setup.reward), setup.folder(number)
    samples, rated, log_sampled, log_prior, groups = (
        folder / f"{name}.jsonl" for name in ("samples", "rated", "log_sampled", "log_prior", "groups")
    )

    def starts(output: Path, what: str) -> bool:
        finished = is_finished(output)
        print(f"iteration {number}: {what}" + (", finished before" if finished else ""), flush=True)
        return not finished

    if starts(samples, "answers"):
        system = None if e.chat.system_prompt == "default" else e.chat.system_prompt
        asking = setup.command(
            **vars(_asking(o)), model=str(sampler.path), server=None, schema=None, input=str(setup.prompts),
            output=str(samples), system=system, seed=(o.seed + number - 1) % 2**31, top_k=0, replace_answer=False,
        )  # fmt: skip
        Session(asking, sampler).answer_file()
    if starts(rated, "predicted ratings"):
        rating = setup.command(
            model=str(setup.reward.path), template="source", no_verify=True, input=str(samples), output=rated,
            turns="last", on_bad_row="skip", chunk_rows=0, row_length=0, rows=0,
        )  # fmt: skip
        annotate(rating, 1, 1)
    answered, unrated = rated_groups(rated, schema)
    for output, about, labelled in ((log_sampled, sampler, True), (log_prior, setup.prior, False)):
        if starts(output, f"log-probabilities {'with' if labelled else 'without'} a label line"):
            job = {"command": "iterate", "input": file_hashes([str(rated)])[str(rated)],
                   "model": folder_checksum(about.path), "dtype": e.compute.dtype}  # fmt: skip
            bundle = open_bundle(about, e.mesh, dtype=e.compute.dtype)
            asked = [one.group for one in answered]
            score_groups(output, asked, bundle, job, labelled=labelled, row_length=e.batch.row_length)
            del bundle
    scores, longest = (read_scores(log_sampled), read_scores(log_prior)), e.batch.row_length
    weighed, unused = weighed_groups(answered, *scores, schema, o.edges, longest)
    found = weighing(setup, samples, answered, weighed)
    if starts(groups, "groups"):
        job = {"command": "iterate", "edges": o.edges, "attributes": schema.to_json(), "row_length": longest,
               "input": [*file_hashes([str(rated), str(log_sampled), str(log_prior)]).values()]}  # fmt: skip
        with resumable(groups, job) as output:
            output.skip([*unrated, *unused])
            output.add(0, [group.to_json() for group in weighed])
    print(weighing_text(found, [*unrated, *unused]), flush=True)
    return groups, found


def weighing(
    setup: Setup, samples: Path, answered: Sequence[RatedGroup], weighed: Sequence[Conversation]
) -> dict[str, Any]:
    """What `Iteration` says of the answers. Raises DataError: no group is left."""
    prompts, answers = (sum(1 for _ in path.open("rb")) for path in (setup.prompts, samples))
    if not weighed:
        cure = "another --workdir, with more --max-new-tokens, so that answers end, or a higher --temperature"
        raise DataError("no prompt has two different answers that can be weighed", file=str(samples), cure=cure)
    means = np.concatenate([one.predicted for one in answered]).mean(0)
    return {
        "prompts": prompts, "answers": answers,
        "left_out": answers - sum(len(group.samples) for group in weighed), "groups": len(weighed),
        "effective_samples": float(np.mean([effective_samples(group) for group in weighed])),
        "ratings": {name: float(mean) for name, mean in zip(rated_schema(setup.reward).names, means, strict=True)},
    }  # fmt: skip


def weighing_text(found: Mapping[str, Any], skipped: Sequence[Skipped]) -> str:
    reasons = Counter(one.reason for one in skipped)
    reasons["empty (rated.jsonl.skipped.jsonl)"] = found["left_out"] - len(skipped)
    why = "; ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
    rated = ", ".join(f"{name} {mean:.2f}" for name, mean in found["ratings"].items())
    weighed = found["answers"] - found["left_out"]
    return (
        f"{weighed} of {found['answers']} answers have a weight, of {found['groups']} of {found['prompts']} prompts"
        + (f" (left out: {why})" if why else "")
        + f"\neffective samples {found['effective_samples']:.2f} of {weighed / found['groups']:.2f} to a prompt; "
        f"mean predicted ratings: {rated}"
    )


def first_distance(e: Experiment) -> float:
    """`distance` on the groups that are held out before the first step, where all b' are equal: KL(w' || uniform)."""
    (held_out,) = (part.splits[1] for part in load_parts(e)[0] if OBJECTIVE in part.objectives)
    return float(np.mean([np.log(len(group.samples)) - entropy(weights(group)) for group in held_out]))


def table(found: Sequence[Iteration]) -> str:
    """A line an iteration."""
    names = list(found[0].ratings)
    head = ["iteration", "prompts", "answers", "left out", "effective", "distance before", "after", *names]
    rows = [
        [*map(str, (one.number, one.groups, one.answers, one.left_out)), f"{one.effective_samples:.2f}",
         f"{one.before:.4f}", f"{one.after:.4f}", *(f"{one.ratings[name]:.2f}" for name in names)]
        for one in found
    ]  # fmt: skip
    return "\n".join(text_table([head, *rows], ">" * len(head)))


def _asking(o: Options) -> argparse.Namespace:
    """What `settings_of` reads."""
    asked = {"combinations": o.combinations or None, "quality": o.quality or None, "on_bad_row": o.on_bad_row}
    return argparse.Namespace(attributes=o.attributes, sweep=[], **asked)


def _ranges(schema: Schema) -> tuple[tuple[str, float, float], ...]:
    return tuple((a.name, a.low, a.high) for a in schema.attributes)
