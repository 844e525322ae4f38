"""How well a reward recipe predicts unseen prompts: trained once a fold, beside predictors that know only lengths.

    python benchmarks/cross_validation.py --data embedded:helpsteer --output DIR \
        -- --config configs/rm_smollm2.py --config.optimizer.learning_rate=1e-4

What follows `--` goes to `steerjax.train` as it is. Folds are cut by prompt; a fold that is finished is not trained
again. The predictors beside the model are fitted on the same training rows: the mean rating, a straight line in the log
of the response's characters, and a quadratic in the logs of the prompt's and the response's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from steerjax.attributes import SCHEMAS
from steerjax.data.conversation import Conversation
from steerjax.data.loading import kfold_by_prompt, load_conversations


def log_lengths(conversations: Sequence[Conversation]) -> np.ndarray:
    """Of the last prompt and the response, in characters: [E, 2]."""
    return np.log1p([[len(turn.content) for turn in conversation.turns[-2:]] for conversation in conversations])


def fitted(train: np.ndarray, ratings: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Least squares with an intercept: features [N, F], ratings [N, A] -> predictions [E, A]."""
    design, new = (np.column_stack([np.ones(len(x)), x]) for x in (train, held_out))
    return new @ np.linalg.lstsq(design, ratings, rcond=None)[0]


def quadratic(lengths: np.ndarray) -> np.ndarray:
    prompt, response = (lengths - 6.0).T  # near their middle, so that the columns are not all one
    return np.column_stack([prompt, response, prompt * response, prompt**2, response**2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--schema", default="helpsteer")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the folds")
    parser.add_argument("training", nargs="*", help="after --: flags of steerjax.train; without any, no model")
    options = parser.parse_args()
    schema = SCHEMAS[options.schema]
    names = schema.names
    conversations, _ = load_conversations([options.data], schema, on_duplicate="keep")
    ratings, predictions = [], {"mean rating": [], "log length": [], "lengths, quadratic": []}
    for fold in range(options.folds):
        parts = kfold_by_prompt(conversations, options.folds, fold, options.seed)
        truth = [np.array([[c.turns[-1].ratings[name] for name in names] for c in part]) for part in parts]
        lengths = [log_lengths(part) for part in parts]
        one = {
            "mean rating": np.tile(truth[0].mean(0), (len(truth[1]), 1)),
            "log length": fitted(lengths[0][:, 1:], truth[0], lengths[1][:, 1:]),
            "lengths, quadratic": fitted(quadratic(lengths[0]), truth[0], quadratic(lengths[1])),
        }
        if options.training:
            one["model"] = trained(parts, options.output / f"fold-{fold}", options.training, names)
        ratings.append(truth[1])
        print(f"fold {fold}", {name: round(float(np.mean((p - truth[1]) ** 2)), 3) for name, p in one.items()})
        for name, predicted in one.items():
            predictions.setdefault(name, []).append(predicted)
    truth = np.concatenate(ratings)
    print(f"\n{len(truth)} responses\n{'':20}{'MSE':>8}" + "".join(f"{name:>14}" for name in names) + "  (Pearson)")
    for name, parts in predictions.items():
        predicted = np.concatenate(parts)
        pearson = [np.corrcoef(predicted[:, i], truth[:, i])[0, 1] for i in range(len(names))]
        print(f"{name:20}{np.mean((predicted - truth) ** 2):8.3f}" + "".join(f"{r:14.2f}" for r in pearson))


def trained(parts, folder: Path, training: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Predictions [E, A] for the second part of a model trained on the first."""
    report = folder / "run" / "report" / "predictions.jsonl"
    if not report.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in zip(("train", "validation"), parts, strict=True):
            lines = [json.dumps(conversation.to_json()) + "\n" for conversation in part]
            (folder / f"{name}.jsonl").write_text("".join(lines))
        command = [
            sys.executable, "-m", "steerjax.train", *training, f"--workdir={folder / 'run'}",
            f"--config.data.train=('{folder / 'train.jsonl'}',)",
            f"--config.data.validation=('{folder / 'validation.jsonl'}',)", "--config.data.on_duplicate=keep",
        ]  # fmt: skip
        with (folder / "log").open("w") as log:
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)
    rows = [json.loads(line)["predicted_ratings"] for line in report.read_text().splitlines()]
    return np.array([[row[name] for name in names] for row in rows])


if __name__ == "__main__":
    main()
