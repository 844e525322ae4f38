"""The report of an objective whose result is a few numbers: a table, and the loss against the step."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np


class LossPage(NamedTuple):
    """What it says."""

    heading: str
    counted: str  # what the numbers were taken over
    values: Mapping[str, float]
    losses: Mapping[str, np.ndarray]  # `Objective.losses`
    unit: str  # of the loss

    def write(self, folder: Path | None, summary: Mapping[str, str], config_text: str) -> str:
        """Writes page and plot into the folder, if there is one; returns what is printed."""
        width = max(28, *map(len, self.values))
        table = "\n".join(f"{name:>{width}}  {value:.4f}" for name, value in self.values.items())
        text = f"{self.counted}\n{table}"
        if folder is not None:
            from steerjax.report.page import fenced, write_page
            from steerjax.report.plots import plot_losses

            plot_losses(self.losses, folder / "loss.png", self.unit)
            write_page(
                folder, [f"# {self.heading}", fenced(text), "![Loss against the step](loss.png)"], summary, config_text
            )
        return text
