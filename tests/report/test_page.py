import json
import subprocess
import sys

import numpy as np
import pytest

from steerjax.errors import SteerjaxError
from steerjax.report.page import (
    comparison_sentences,
    evaluate_predictions,
    format_table,
    plot_losses,
    require_matplotlib,
    write_report,
)
from steerjax.report.plots import _by_step, _running_mean, _spread
from steerjax.report.results import average_mse, compared_names, lowest
from steerjax.schema import HELPSTEER, STEERLM

PNG = b"\x89PNG\r\n\x1a\n"


def _result(predicted, ratings, names=("a",), mask=None, lengths=None, train=None):
    """Train ratings 1 and 3 at lengths 9 and 99: the mean is 2, the line 1 + 2 * (log10(1 + length) - 1)."""
    ratings = np.asarray(ratings, float)
    mask = np.ones_like(ratings, bool) if mask is None else mask
    lengths = np.full(len(ratings), 99) if lengths is None else lengths
    train = np.tile([[1.0], [3.0]], (1, len(names))) if train is None else train
    return evaluate_predictions(
        names, predicted, ratings, mask, lengths, [f"data:{i}" for i in range(len(ratings))],
        train, np.isfinite(train), [9, 99],
    )  # fmt: skip


def _random_result(names=HELPSTEER.names, count=40, seed=0):
    rng = np.random.default_rng(seed)
    ratings = rng.integers(0, 5, (count, len(names))).astype(float)
    predicted = ratings * 0.4 + rng.normal(size=ratings.shape)
    return _result(predicted, ratings, names, rng.random(ratings.shape) < 0.8, rng.integers(5, 3000, count))


def _records(names=HELPSTEER.names):
    train = [{"step": s, "split": "train", "loss": 5 / s + 0.6, "grad_norm": 1.0} for s in range(1, 41)]
    metrics = {f"attributes/{name}/mse": 0.7 for name in names} | {f"attributes/{names[0]}/pearson": None}
    return [*train, {"step": 40, "split": "validation", "loss": 0.7, **metrics}]


def test_baselines_are_fitted_on_the_training_split():
    result = _result([[3.0], [3.0]], [[3.0], [2.0]])
    assert result.baselines["mean rating"]["a"]["mse"] == pytest.approx(0.5)
    assert result.baselines["log length"]["a"]["mse"] == pytest.approx(0.5)
    assert result.metrics["a"]["mse"] == pytest.approx(0.5)
    assert result.ids == ("data:0", "data:1")


def test_table_says_a_win():
    table = format_table(_result([[2.8], [3.2]], [[3.0], [3.0]], lengths=[9, 9]))
    header, row = table.splitlines()[0], table.splitlines()[2]
    assert header.split()[:6] == ["attribute", "ratings", "MSE", "MAE", "Pearson", "Spearman"]
    assert header.endswith("MSE mean rating  MSE log length  lowest MSE")
    assert row.split() == ["a", "2", "0.040", "0.200", "-", "-", "1.000", "4.000", "model"]
    assert "The model beats the mean-rating baseline on average MSE (0.040 to 1.000, 96.0% lower)." in table
    assert "The model beats the length baseline on average MSE (0.040 to 4.000, 99.0% lower)." in table


def test_table_says_a_loss():
    table = format_table(_result([[2.1], [2.1]], [[3.0], [2.6]]))
    assert "beats the mean-rating baseline on average MSE (0.530 to 0.680, 22.1% lower)." in table
    assert "The model loses to the length baseline on average MSE (0.530 to 0.080, 562.5% higher)." in table
    assert table.splitlines()[2].split()[-2:] == ["log", "length"]


def test_table_says_level():
    table = format_table(_result([[2.0001]], [[2.5]]))
    assert "The model is level with the mean-rating baseline on average MSE (0.250 to 0.250)." in table
    assert table.splitlines()[2].endswith("model = mean rating = log length")


def test_columns_line_up():
    lines = format_table(_random_result()).splitlines()
    start = lines[0].index("lowest MSE")
    assert [line[start - 2 : start] for line in lines[2:7]] == ["  "] * 5
    assert lines[8].startswith("average")


def test_averages_are_over_the_same_attributes():
    train = np.array([[1.0, np.nan], [3.0, np.nan]])
    result = _result([[2.0, 9.0]], [[2.0, 1.0]], names=("a", "b"), train=train)
    assert compared_names(result) == ("a",)
    assert average_mse(result)["model"] == 0.0
    assert "Averages leave out b" in format_table(result)


def test_without_a_training_split():
    empty = np.empty((0, 1))
    result = evaluate_predictions(("a",), [[1.0]], [[2.0]], [[True]], [7], ["x"], empty, empty, [])
    assert average_mse(result) == {"model": 1.0, "mean rating": None, "log length": None}
    assert all(sentence.startswith("No comparison") for sentence in comparison_sentences(result))


def test_predictions_that_are_not_finite_are_no_win():
    result = _result([[np.nan], [3.0]], [[3.0], [3.0]])
    assert "predictions are NaN or infinite" in format_table(result)
    assert lowest({"model": float("nan"), "x": 1.0, "y": 2.0}) == ("x",)


def test_lengths_and_ids_must_fit():
    with pytest.raises(ValueError, match="2 examples with 1 lengths"):
        _result([[1.0], [1.0]], [[1.0], [1.0]], lengths=[3])


@pytest.mark.parametrize("names", [HELPSTEER.names, STEERLM.names, ("quality", "toxicity"), ("helpfulness",)])
def test_report_files(tmp_path, names):
    write_report(
        tmp_path / "new" / "report", _random_result(names), iter(_records(names)), {"base model": "x|y"}, "{'k': '```'}"
    )
    directory = tmp_path / "new" / "report"
    for plot in ("loss.png", "predictions.png", "correlations.png"):
        assert (directory / plot).read_bytes().startswith(PNG)
    text = (directory / "report.md").read_text(encoding="utf-8")
    for part in (
        *names,
        "average",
        "loss.png",
        "What this means",
        "| base model | x\\|y |",
        "````\n{'k': '```'}\n````",
    ):
        assert part in text
    for sentence in comparison_sentences(_random_result(names)):
        assert sentence in text


def test_report_without_training_records(tmp_path):
    write_report(tmp_path, _random_result(), [], {}, "{}")
    assert not (tmp_path / "loss.png").exists()
    assert "loss.png" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_predictions_hold_no_nan(tmp_path):
    result = _result([[1.0, np.nan], [np.inf, 9.0]], [[2, -100], [3, 4]], ("a", "b"), np.array([[1, 0], [1, 1]], bool))
    write_report(tmp_path, result, _records(("a", "b")), {}, "{}")
    text = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8")
    assert "NaN" not in text
    assert [json.loads(line) for line in text.splitlines()] == [
        {"id": "data:0", "ratings": {"a": 2.0}, "predicted_ratings": {"a": 1.0, "b": None}},
        {"id": "data:1", "ratings": {"a": 3.0, "b": 4.0}, "predicted_ratings": {"a": None, "b": 9.0}},
    ]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "records",
    [
        [],
        [{"step": 1, "split": "train", "loss": 0.5}],
        [{"step": 1, "split": "train", "loss": None}, {"step": 2, "split": "validation", "loss": float("nan")}],
        [{"step": 1, "split": "validation", "loss": 2.0}],
    ],
)
def test_loss_plot_of_little_data(tmp_path, records):
    plot_losses(records, tmp_path / "loss.png", {"mean rating": 0.7, "log length": None})
    plot_losses(records, tmp_path / "plain.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)


@pytest.mark.filterwarnings("error")
def test_report_of_an_empty_split(tmp_path):
    write_report(tmp_path, _result(np.empty((0, 1)), np.empty((0, 1))), _records(("a",)), {}, "{}")
    assert (tmp_path / "predictions.jsonl").read_text() == ""


def test_a_resumed_step_counts_once():
    np.testing.assert_array_equal(_by_step([(2, 1.0), (1, 3.0), (2, 5.0), (3, None)]), [[1, 3], [2, 5]])


def test_running_mean():
    np.testing.assert_allclose(_running_mean(np.array([1.0, 2, 6, 4]), 3), [1.5, 3, 4, 5])


def test_labels_do_not_overlap():
    centres = _spread([0.5, 0.5, 0.52, 0.9], [0.1, 0.1, 0.1, 0.1])
    assert min(np.diff(centres)) >= 0.1 - 1e-12
    assert centres[-1] == 0.9


def test_missing_matplotlib_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    with pytest.raises(SteerjaxError, match=r"pip install 'steerjax\[plots\]'"):
        require_matplotlib()
    with pytest.raises(SteerjaxError):
        write_report(tmp_path / "report", _random_result(), _records(), {}, "{}")
    assert not (tmp_path / "report").exists()


def test_import_loads_neither_matplotlib_nor_jax():
    code = "import sys, steerjax.report.page; assert not {'matplotlib', 'jax'} & set(sys.modules), 'imported too early'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plots_leave_pyplot_alone(tmp_path):
    code = (
        "import sys; from steerjax.report.page import plot_losses; "
        f"plot_losses([], {str(tmp_path / 'loss.png')!r}); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
