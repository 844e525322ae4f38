"""The loss curves of training.py, all programs on one plot: results/training.json -> results/training.png

python benchmarks/curves.py
"""

from __future__ import annotations

import json

from turns import RESULTS

from steerjax.report.plots import BLUE, GREY, INK, ORANGE, new_figure


def main() -> None:
    result = json.loads((RESULTS / "training.json").read_text())
    ours, *others = sorted(result["found"], key=lambda name: (name != "steerjax", name))
    with new_figure(RESULTS / "training.png", 8.4, 4.8) as figure:
        axes = figure.subplots()
        axes.set(title="Reward-model training: loss of each step", xlabel="step", ylabel="mean squared error")
        axes.xaxis.get_major_locator().set_params(integer=True)
        marks = zip([ours, *others], "-os^Dv", [BLUE, ORANGE, INK, GREY, ORANGE, INK], strict=False)
        for name, mark, color in marks:
            one = result["found"][name]
            losses = [turn["loss"] for turn in (one["warm_up"], *one["turns"])]
            style = {"linewidth": 2} if mark == "-" else {"fillstyle": "none", "markersize": 6 + 2 * others.index(name)}
            axes.plot(range(1, len(losses) + 1), losses, mark, color=color, label=name, **style)
        figure.legend(loc="outside lower center", ncols=4)


if __name__ == "__main__":
    main()
