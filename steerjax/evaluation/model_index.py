"""The `model-index` of a model card: what the run's last validation found, and what outputs of `evaluate` say."""

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult

from steerjax.errors import ConfigError, DataError
from steerjax.evaluation import judge_bench, reward_bench, reward_bench_2, rm_bench
from steerjax.evaluation.completions import LONGER
from steerjax.evaluation.suite import ROWS, read_results
from steerjax.hf.card import hub_id, public
from steerjax.report.records import own_losses, validation_records

_RATING = "text-classification"  # the hub's task of a reward model
_METRICS = {  # ours -> the name of the `evaluate` library, ours in words
    "mse": ("mse", "MSE"),
    "mae": ("mae", "MAE"),
    "pearson": ("pearsonr", "Pearson"),
    "spearman": ("spearmanr", "Spearman"),
    "kappa": ("cohen_kappa", "quadratic-weighted kappa"),
}


class _Suite(NamedTuple):
    task: str
    id: str  # of the data, on the hub where it is there
    name: str
    metric: str
    figures: Sequence[str]  # what models are compared by, of each score; every score has the last


_SUITES = {
    "reward_bench": _Suite(_RATING, "allenai/reward-bench", "RewardBench", "accuracy",
                           (*reward_bench.SECTIONS, "mean")),
    "reward_bench_2": _Suite(_RATING, "allenai/reward-bench-2", "RewardBench 2", "accuracy",
                             (*reward_bench_2.SUBSETS, "mean")),
    "rm_bench": _Suite(_RATING, "THU-KEG/RM-Bench", "RM-Bench", "accuracy",
                       (*rm_bench.DOMAINS, *rm_bench.LEVELS, "Overall")),
    "judge_bench": _Suite(_RATING, "ScalerLab/JudgeBench", "JudgeBench", "accuracy",
                          (*judge_bench.CATEGORIES, "Overall")),
    "truthfulqa": _Suite("text-generation", "truthfulqa/truthful_qa", "TruthfulQA", "accuracy", ("mc1", "mc2")),
    "mt_bench": _Suite("text-generation", "mt_bench", "MT-Bench", "score", ("average",)),
}  # fmt: skip


def validation_results(checkpoint: Path, provenance: Mapping[str, Any]) -> list[EvalResult]:
    """Of the validation at the checkpoint's step, where the run's metrics.jsonl has one."""
    config, found = provenance.get("config") or {}, []
    for record in validation_records(checkpoint)[-1:]:
        for objective in config.get("objectives", ()):
            group = config.get(objective) or {}
            data = group if group.get("train") else config.get("data", {})
            sources = data.get("validation") or data.get("train") or ()
            split = "validation" if data.get("validation") else "held out of train"
            task = "text-generation" if objective == "sft" else _RATING
            for metric, name, value in _own(objective, record, group.get("weight", 1.0)):
                found += _result(task, *_dataset(sources), split, metric, name, value)
    return found


def _own(objective: str, record: Mapping, weight: float) -> Iterator[tuple[str, str, float | None]]:
    """Metric, name and value of an objective's part of a validation line."""
    if objective == "regression":
        for key in record:
            if key.startswith("attributes/"):
                _, attribute, metric = key.split("/")
                yield _METRICS[metric][0], f"{_METRICS[metric][1]}, {attribute}", record[key]
    if objective == "bradley_terry":
        yield "accuracy", "accuracy of pairs", record.get("accuracy")
    if objective == "sft":
        for _, loss in own_losses([record], "sft", weight)["validation"].tolist():
            yield "perplexity", "perplexity", math.exp(loss)
        yield "accuracy", "accuracy of the next token", record.get("accuracy")
    if objective == "attribute_lm":
        yield "accuracy", "accuracy of the tokens of label lines", record.get("label_accuracy")


def suite_results(folder: Path, model: Path) -> list[EvalResult]:
    """Of an output of `evaluate` of this model, the figures that models are compared by.

    Raises DataError: no output of a suite, or nothing in it is defined. ConfigError: it is of another model, or its
    MT-Bench answers were judged by a reward model.
    """
    said = read_results(folder)
    suite, figures, options = said["suite"], said["figures"], said["options"]
    _check_model(folder, options.get("model"), model)
    if said.get("judged_by") == "reward model":
        wrong = f"--evaluation {folder}: a reward model judged, and its ratings are no MT-Bench scores"
        raise ConfigError(f"{wrong}; cure: leave it out, or evaluate with --judge of a language model's server")
    judge = f", judged by {public(said['judge'])}" if "judge" in said else ""
    named = list(_named(suite, figures))
    if suite == "attributes":
        task, dataset = _RATING, _dataset(options["data"])
    elif suite == "steerability":
        task, dataset = "text-generation", _dataset([options.get("input") or options["prompts"]])
    else:
        task, dataset = _SUITES[suite].task, (_SUITES[suite].id, _SUITES[suite].name)
    split = _split(options.get("data"))
    found = []
    for key, metric, name in named:
        found += _result(task, *dataset, split, metric, name + judge, **(figures.get(key) or {"value": None}))
    if not found:
        raise DataError(
            "all figures that a card names are undefined", file=str(folder), cure="more rows, or leave it out"
        )
    return found


def _named(suite: str, figures: Collection[str]) -> Iterator[tuple[str, str, str]]:
    """Figure, metric and name of what models are compared by."""
    if suite == "attributes":
        for key in figures:
            attribute, _, metric = key.rpartition("/")
            if metric in _METRICS:
                yield key, _METRICS[metric][0], f"{_METRICS[metric][1]}, {attribute}"
        return
    if suite == "steerability":
        for key in figures:
            attribute, *kind = key.split("/")
            if kind == ["slope", "predicted"]:
                yield key, "slope", f"predicted rating per requested point, {attribute}"
            if kind == ["spearman", "predicted"]:
                yield key, "spearmanr", f"Spearman of request and prediction, {attribute}"
            if attribute == "steerbench":
                yield key, "score", f"STEERBENCH {kind[0]}"
        return
    known, last = _SUITES[suite], _SUITES[suite].figures[-1]
    scores = [key.removesuffix(last) for key in figures if key.split("/")[-1] == last]
    for score in [""] if "" in scores else [score for score in scores if score != LONGER]:
        for name in known.figures:
            yield f"{score}{name}", known.metric, f"{score}{name}"


def _check_model(folder: Path, given: str | None, model: Path) -> None:
    """Of the model's bytes where the suite keeps their digest, else of its path where that is still there."""
    from steerjax.bundle import locate
    from steerjax.checksums import folder_checksum

    settings = folder / f"{ROWS}.settings.json"
    digest = json.loads(settings.read_text(encoding="utf-8")).get("model") if settings.exists() else None
    if digest:
        same = digest == folder_checksum(model)
    else:
        same = not given or not Path(given).exists() or locate(given, verify=False).resolve() == model.resolve()
    if not same:
        raise ConfigError(
            f"--evaluation {folder}: it is of another model ({given}) than {model}; cure: evaluate --model {model}"
        )


def _dataset(sources: Sequence[str]) -> tuple[str, str]:
    """Id and name of data: the hub's, or the files' names."""
    ids = [hub_id(source) or public(source) for source in sources]
    return " + ".join(ids), " + ".join(id.split("/")[-1] for id in ids)


def _split(data: str | Sequence[str] | None) -> str:
    """That of `hub:ID:SPLIT`, else test: what is evaluated on is not trained on."""
    sources = [data] if isinstance(data, str) else data or []
    splits = [source.split(":")[2] for source in sources if source.startswith("hub:") and source.count(":") > 1]
    return splits[0] if splits else "test"


def _result(
    task: str, id: str, name: str, split: str, metric: str, words: str, value: float | None, count: int | None = None,
    interval: Sequence[float] | None = None,
) -> list[EvalResult]:  # fmt: skip
    """None for a value that is undefined."""
    if value is None or not math.isfinite(value):
        return []
    facts: dict[str, Any] = {"rows": count} if count else {}
    if interval:
        facts["interval_95"] = [round(end, 6) for end in interval]
    return [EvalResult(task_type=task, dataset_type=id, dataset_name=name, dataset_split=split, metric_type=metric,
                       metric_name=words, metric_value=round(float(value), 6), metric_args=facts or None)]  # fmt: skip
