"""STEERBENCH's measures of steering (arXiv 2505.23816, section 3; github.com/tchang1997/steerability, MIT).

A text is a point in a goal space of d attributes, each from 0 to 1: `source` z0 before steering, `output` z^ after it,
`target` z* where it was to go, NaN where an attribute was to stay as it is. All are [n, d].

Two variants. `continuous` is the paper's formula on the numbers themselves. `binned` is what the repository's report
prints (`steerability_metrics.main_steerability_evaluation`), so published figures are of it: every movement is the
number of seven bins around the source that it crosses, over 7.
"""

from typing import NamedTuple

import numpy as np

CUTS = np.array([-1.0, -0.5, -0.2, -0.1, 0.1, 0.2, 0.5, 1.0])  # `DIRECT_PROMPT_CUT_POINTS`
MEASURES = ("steering error", "miscalibration", "orthogonality")


class Movement(NamedTuple):
    """[n, d] each: missed = target - output, moved = output - source, asked = target - source."""

    missed: np.ndarray
    moved: np.ndarray
    asked: np.ndarray


def continuous(source: np.ndarray, output: np.ndarray, target: np.ndarray) -> Movement:
    target = np.where(np.isnan(target), source, target)
    return Movement(target - output, output - source, target - source)


def binned(source: np.ndarray, output: np.ndarray, target: np.ndarray) -> Movement:
    """In bins over their number. As there, a source of 1 that stays at 1 counts as moved by 4 of 7 bins."""
    wanted = np.where(np.isnan(target), 0.0, target - source)
    target = np.where(np.isnan(target), source, target)
    cuts = np.clip(source[..., None] + CUTS, 0, 1)
    bins, middle = len(CUTS) - 1, (len(CUTS) - 2) / 2
    reached, goal = ((values[..., None] >= cuts).sum(2) - 1 for values in (output, target))
    asked = (wanted[..., None] >= CUTS).sum(2) - 1 - middle
    return Movement((reached - goal) / bins, (reached - middle) / bins, asked / bins)


def measures(movement: Movement) -> dict[str, np.ndarray]:
    """`MEASURES` of each text [n]; 0 is best.

    steering error: how far from the target it came out. miscalibration: its part along what was asked, over the length
    of that (may exceed 1). orthogonality: its part across, over the length of the movement (0 to 1).
    """
    missed, moved, asked = movement
    length = np.linalg.norm(asked, axis=1)
    along = np.abs(np.sum(missed * asked, axis=1) / (length + 1e-8))
    across = missed - (np.sum(missed * asked, axis=1) / (np.sum(asked * asked, axis=1) + 1e-8))[:, None] * asked
    side = np.linalg.norm(across, axis=1) / (np.linalg.norm(moved, axis=1) + 1e-4 * (length + 1e-8))
    found = np.linalg.norm(missed, axis=1), along / (length + 1e-8), np.clip(side, 0, 1)
    return dict(zip(MEASURES, found, strict=True))
