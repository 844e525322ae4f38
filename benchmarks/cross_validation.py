"""How well a reward recipe predicts unseen prompts: trained once a fold, beside predictors that know only lengths.

    python benchmarks/cross_validation.py --data embedded:helpsteer --output DIR \
        -- --config configs/rm_smollm2.py --config.optimizer.learning_rate=1e-4

What follows `--` goes to `steerjax.train` as it is. Folds are cut by prompt; run again with the same folder, finished
folds stay as they are. The predictors beside the model are fitted on the same training rows: the report's two
baselines, and a quadratic in the logs of the prompt's and the response's characters.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from steerjax.data.conversation import Conversation
from steerjax.data.loading import load_conversations, shuffled_keys
from steerjax.errors import ConfigError, reported_errors
from steerjax.report.page import text_table
from steerjax.report.results import (
    LOG_LENGTH,
    MEAN_RATING,
    MODEL,
    EvaluationResult,
    attribute_metrics,
    baseline,
    mean_metric,
)
from steerjax.schema import SCHEMAS, make_schema


def quadratic_baseline(train: np.ndarray, ratings: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Least squares on all terms up to the second degree in two log lengths: `[E, 2]` and `[n, 2]` -> `[n, A]`."""

    def terms(characters):
        prompt, response = (np.log1p(characters) - 6.0).T  # near their middle, so that the columns are not all alike
        return np.column_stack([prompt**0, prompt, response, prompt * response, prompt**2, response**2])

    rated = [(y, np.isfinite(y)) for y in ratings.T]
    fits = [np.linalg.lstsq(terms(train[seen]), y[seen], rcond=None)[0] for y, seen in rated]
    return terms(lengths) @ np.column_stack(fits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--schema", default="helpsteer", choices=SCHEMAS)
    parser.add_argument("--attribute", action="append", nargs=3, default=[], metavar=("NAME", "LOW", "HIGH"))
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the folds")
    parser.add_argument("training", nargs="*", help="after --: flags of steerjax.train; without any, no model")
    options = parser.parse_args()
    own = tuple((name, float(low), float(high)) for name, low, high in options.attribute)
    schema = make_schema(options.schema, own)
    names, training = schema.names, [*options.training]
    if training:
        training += [f"--config.data.attributes={own!r}"] if own else [f"--config.data.schema={options.schema}"]
    conversations = load_conversations([options.data], schema).conversations
    folds = []  # (ratings, {predictor: predictions}) of what each holds out
    for fold in range(options.folds):
        parts = kfold_by_prompt(conversations, options.folds, fold, options.seed)
        (y, lengths), (truth, held_out) = (arrays(part, names) for part in parts)
        predictions = {
            MEAN_RATING: baseline(0, y, lengths[:, 1], held_out[:, 1]),
            LOG_LENGTH: baseline(1, y, lengths[:, 1], held_out[:, 1]),
            "lengths, quadratic": quadratic_baseline(lengths, y, held_out),
        }
        if training:
            predictions[MODEL] = trained(parts, options.output / f"fold-{fold}", training, names)
        folds.append((truth, predictions))
        mse = {who: mean_metric(attribute_metrics(p, truth, schema), "mse") for who, p in predictions.items()}
        print(f"fold {fold}: " + ", ".join(f"{who} {value:.3f}" for who, value in mse.items()), flush=True)
    truth = np.concatenate([fold[0] for fold in folds])
    found = {}
    for who in folds[0][1]:
        predicted = np.concatenate([fold[1][who] for fold in folds])
        metrics = attribute_metrics(predicted, truth, schema)
        found[who] = EvaluationResult(schema, predicted, truth, {}, metrics, {}, range(len(truth)))
    print(f"\n{len(truth)} responses, each held out once; averages with 95% intervals (bootstrap over responses)")
    for title, key, of in (("RMSE", "mse", lambda x: x**0.5), ("Pearson", "pearson", lambda x: x)):
        rows = [[title, "average", "interval", *names]]
        for who, result in found.items():
            values = [result.metrics[name][key] for name in names]
            cells = [
                "-" if value is None else f"{of(value):.3f}" for value in (mean_metric(result.metrics, key), *values)
            ]
            low, high = result.interval(key) or (np.nan, np.nan)
            rows.append([who, cells[0], f"{of(low):.3f} to {of(high):.3f}", *cells[1:]])
        print("", *text_table(rows, "<" + ">" * (len(rows[0]) - 1)), sep="\n")


def kfold_by_prompt(
    conversations: Sequence[Conversation], folds: int, fold: int, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """(train, validation) of fold `fold` (from 0) of `folds`; each prompt is held out in exactly one."""
    keys, shuffled = shuffled_keys(conversations, seed)
    if not 2 <= folds <= len(shuffled):
        raise ConfigError(f"{folds} folds of {len(shuffled)} prompts; cure: --folds from 2 to the number of prompts")
    held_out = set(shuffled[fold::folds])
    rows = list(zip(conversations, keys, strict=True))
    return [c for c, key in rows if key not in held_out], [c for c, key in rows if key in held_out]


def arrays(conversations: Sequence[Conversation], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Ratings of the last turns [E, A], NaN where missing; characters of prompt and response [E, 2]."""
    ratings = [conversation.turns[-1].ratings or {} for conversation in conversations]
    values = np.array([[rated.get(name, np.nan) for name in names] for rated in ratings])
    return values, np.array([[len(turn.content) for turn in c.turns[-2:]] for c in conversations])


def trained(parts, folder: Path, training: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Predictions [E, A] for the second part of a model trained on the first."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in zip(("train", "validation"), parts, strict=True):
        lines = [json.dumps(conversation.to_json()) + "\n" for conversation in part]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    command = [
        sys.executable, "-m", "steerjax.train", *training, f"--workdir={folder / 'run'}",
        f"--config.data.train=('{folder / 'train.jsonl'}',)",
        f"--config.data.validation=('{folder / 'validation.jsonl'}',)",
    ]  # fmt: skip
    with (folder / "log").open("a") as log:
        subprocess.run(command, stdout=log, check=True)  # a finished run stays; other flags are refused
    rows = (folder / "run" / "report" / "predictions.jsonl").read_text().splitlines()
    predicted = {row["id"]: row["predicted_ratings"] for row in map(json.loads, rows)}
    return np.array([[predicted[conversation.id][name] for name in names] for conversation in parts[1]])


if __name__ == "__main__":
    with reported_errors():
        main()
