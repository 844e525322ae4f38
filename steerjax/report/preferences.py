"""The report of preferences: how often the preferred of two responses has the higher score, and how sure scores are."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from steerjax.files import whole_file
from steerjax.report.figures import UNIT, figures
from steerjax.report.page import bullets, write_page
from steerjax.report.plots import plot_calibration, plot_losses

BINS = 10


@dataclass(frozen=True)
class PreferenceResult:
    """Of P pairs: scores `[P, 2]`, the preferred response's first, strengths `[P]`, and what follows from them.

    `metrics`: `accuracy` (a tie is half right), `longer`, that of preferring the longer response, `margin`, the mean
    difference of scores, and `calibration`, by how much the predicted probability of a preference is off in the mean
    (expected calibration error in ten bins).
    """

    scores: np.ndarray
    strengths: np.ndarray
    ids: Sequence[str]
    right: np.ndarray  # [P] of the model: 1, 0.5 or 0; the next the same of the longer response
    longer: np.ndarray
    metrics: Mapping[str, float]

    def interval(self, beyond_longer: bool = False) -> tuple[float, float]:
        """95% of the accuracy, or of what it is more than `longer`'s: `report.figures` over pairs."""
        values = self.right - (self.longer if beyond_longer else 0)
        columns, mean = {UNIT: np.arange(len(values)), "x": values}, float(values.mean())
        found = figures(lambda drawn: {"mean": (drawn["x"].mean(), len(values))}, columns)["mean"]
        return found.interval or (mean, mean)


def preference_result(scores, strengths, lengths, ids: Sequence[str]) -> PreferenceResult:
    """From scores and characters `[P, 2]` of both responses, the preferred first."""
    difference = np.asarray(scores, np.float64) @ [1.0, -1.0]
    right, longer = ((np.sign(x) + 1) / 2 for x in (difference, np.asarray(lengths, np.float64) @ [1.0, -1.0]))
    centres, observed, counts = calibration(difference)
    metrics = {
        "accuracy": float(right.mean()), "longer": float(longer.mean()), "margin": float(difference.mean()),
        "calibration": float(np.sum(counts * np.abs(observed - centres)) / counts.sum()),
    }  # fmt: skip
    return PreferenceResult(np.asarray(scores), np.asarray(strengths), ids, right, longer, metrics)


def calibration(difference: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bins of the probability that a response is preferred: its mean, how often it is, and how many pairs.

    A pair counts from both sides, so that the answer does not depend on which one stands first.
    """
    both = 0.5 * (1 + np.tanh(np.concatenate([difference, -difference]) / 2))
    won = np.repeat([1.0, 0.0], len(difference))
    place = np.minimum((both * BINS).astype(int), BINS - 1)
    counts = np.bincount(place, minlength=BINS)
    kept = counts > 0
    mean = np.bincount(place, both, BINS)[kept] / counts[kept]
    return mean, np.bincount(place, won, BINS)[kept] / counts[kept], counts[kept]


def preference_text(result: PreferenceResult) -> str:
    """The metrics in words."""
    m, (low, high), (less, more) = result.metrics, result.interval(), result.interval(beyond_longer=True)
    verb = "beats" if less > 0 else "loses to" if more < 0 else "is not told apart from"
    return (
        f"{len(result.ids)} pairs: the preferred response scores higher in {m['accuracy']:.3f} of them "
        f"(95% interval {low:.3f} to {high:.3f}), by {m['margin']:.3f} in the mean.\n"
        f"That {verb} preferring the longer one ({m['longer']:.3f}; the difference is {less:.3f} to {more:.3f}).\n"
        f"Predicted probabilities are off by {m['calibration']:.3f} in the mean."
    )


def write_preference_report(
    directory: Path, result: PreferenceResult, losses: Mapping[str, np.ndarray], summary: Mapping[str, str],
    config_text: str, unit: str = "nats a pair",
) -> None:  # fmt: skip
    """The report, `pairs.jsonl` and the plots; arguments as `page.write_report`'s."""
    plot_calibration(*calibration(result.scores @ [1.0, -1.0]), directory / "calibration.png")
    if losses:
        plot_losses(losses, directory / "loss.png", unit)
    with whole_file(directory / "pairs.jsonl") as file:
        for name, (chosen, rejected), strength in zip(result.ids, result.scores, result.strengths, strict=True):
            row = {"id": name, "chosen": float(chosen), "rejected": float(rejected), "strength": float(strength)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    parts = [
        "# Preferences on the validation split",
        bullets(preference_text(result).splitlines()),
        *(["![Loss against the step](loss.png)"] if losses else []),
        "![Predicted probability of a preference against how often it is](calibration.png)",
        "Every validation pair with its scores: [pairs.jsonl](pairs.jsonl).",
    ]
    write_page(directory, parts, summary, config_text)
