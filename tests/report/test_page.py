import base64
import json
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from steerjax.errors import SteerjaxError
from steerjax.report.page import comparison_sentences, few_rows_note, format_table, write_page, write_report
from steerjax.report.plots import plot_losses, require_plots
from steerjax.report.preferences import preference_result, write_preference_report
from steerjax.report.records import own_losses, read_metrics, write_json
from steerjax.report.results import evaluate_predictions, lowest
from steerjax.schema import HELPSTEER, STEERLM, Attribute, Schema, make_schema
from tests.refusals import refused

OWN = make_schema("helpsteer", (("warmth", 1, 5), ("evidence", 1, 10)))
PNG = b"\x89PNG\r\n\x1a\n"


def _schema(names):
    return Schema(tuple(Attribute(name) for name in names))


def _result(predicted, ratings, schema=None, mask=None, lengths=None, train=None):
    """Train ratings 1 and 3 at lengths 9 and 99: the mean is 2, the line 1 + 2 * (log10(1 + length) - 1)."""
    ratings = np.asarray(ratings, float)
    mask = np.ones_like(ratings, bool) if mask is None else mask
    lengths = np.full(len(ratings), 99) if lengths is None else lengths
    schema = schema or _schema("a")
    train = np.tile([[1.0], [3.0]], (1, len(schema))) if train is None else train
    return evaluate_predictions(
        schema, predicted, np.where(mask, ratings, np.nan), lengths, [f"data:{i}" for i in range(len(ratings))],
        train, [9, 99],
    )  # fmt: skip


def _random_result(schema=HELPSTEER, count=40, seed=0):
    rng = np.random.default_rng(seed)
    low, high = np.array([(a.low, a.high) for a in schema.attributes]).T
    ratings = np.round(low + rng.random((count, len(schema))) * (high - low))
    predicted = ratings * 0.4 + rng.normal(size=ratings.shape)
    return _result(predicted, ratings, schema, rng.random(ratings.shape) < 0.8, rng.integers(5, 3000, count))


def _table(result):
    """The lines of the table, without the note above it."""
    lines = format_table(result).splitlines()
    return lines[next(i for i, line in enumerate(lines) if line.startswith("attribute ")) :]


def _losses(names=HELPSTEER.names):
    train = [{"step": s, "split": "train", "loss": 5 / s + 0.6, "grad_norm": 1.0} for s in range(1, 41)]
    metrics = {f"attributes/{name}/mse": 0.7 for name in names} | {f"attributes/{names[0]}/pearson": None}
    return own_losses([*train, {"step": 40, "split": "validation", "loss": 0.7, **metrics}], "regression")


def test_baselines_are_fitted_on_the_training_split():
    result = _result([[3.0], [3.0]], [[3.0], [2.0]])
    assert result.baselines["mean rating"]["a"]["mse"] == pytest.approx(0.5)
    assert result.baselines["log length"]["a"]["mse"] == pytest.approx(0.5)
    assert result.metrics["a"]["mse"] == pytest.approx(0.5)
    assert list(result.ids) == ["data:0", "data:1"]


def test_table_says_a_win():
    result = _result([[2.8], [3.2]], [[3.0], [3.0]], lengths=[9, 9])
    table, (header, _, row) = format_table(result), _table(result)[:3]
    assert header.split()[:7] == ["attribute", "ratings", "MSE", "MAE", "Pearson", "Spearman", "kappa"]
    assert header.endswith("MSE mean rating  MSE log length  lowest MSE")
    assert row.split() == ["a", "2", "0.040", "0.200", "-", "-", "-", "1.000", "4.000", "model"]
    assert "The model beats the mean-rating baseline on average MSE (0.040 to 1.000, 96.0% lower)." in table
    assert "The model beats the length baseline on average MSE (0.040 to 4.000, 99.0% lower)." in table


def test_table_says_a_loss():
    result = _result([[2.1], [2.1]], [[3.0], [2.6]])
    table = format_table(result)
    assert "beats the mean-rating baseline on average MSE (0.530 to 0.680, 22.1% lower)." in table
    assert "The model loses to the length baseline on average MSE (0.530 to 0.080, 562.5% higher)." in table
    assert _table(result)[2].split()[-2:] == ["log", "length"]


def test_table_says_level():
    result = _result([[2.0001]], [[2.5]])
    table = format_table(result)
    assert "The model is level with the mean-rating baseline on average MSE (0.250 to 0.250)." in table
    assert _table(result)[2].endswith("model = mean rating = log length")


def test_columns_line_up():
    lines = _table(_random_result())
    start = lines[0].index("lowest MSE")
    assert [line[start - 2 : start] for line in lines[2:7]] == ["  "] * 5
    assert lines[8].startswith("average")


def test_averages_are_over_the_same_attributes():
    train = np.array([[1.0, np.nan], [3.0, np.nan]])
    result = _result([[2.0, 9.0]], [[2.0, 1.0]], schema=_schema("ab"), train=train)
    assert result.compared == ("a",)
    assert result.average_mse()["model"] == 0.0
    assert "Averages leave out b" in format_table(result)


def test_without_a_training_split():
    empty = np.empty((0, 1))
    result = evaluate_predictions(_schema("a"), [[1.0]], [[2.0]], [7], ["x"], empty, [])
    assert result.average_mse() == {"model": 1.0, "mean rating": None, "log length": None}
    assert all(sentence.startswith("No comparison") for sentence in comparison_sentences(result))
    assert "--train-data" in comparison_sentences(result)[0]


def test_predictions_that_are_not_finite_are_no_win():
    result = _result([[np.nan], [3.0]], [[3.0], [3.0]])
    assert "predictions are NaN or infinite" in format_table(result)
    assert lowest({"model": float("nan"), "x": 1.0, "y": 2.0}) == ("x",)


def test_lengths_must_fit():
    with pytest.raises((ValueError, IndexError)):
        _result([[1.0], [1.0]], [[1.0], [1.0]], lengths=[3, 3, 3])


NINE = Schema(tuple(Attribute(f"quality_{i}", 1.0, 4.0) for i in range(9)))


@pytest.mark.parametrize("schema", [HELPSTEER, STEERLM, OWN, NINE, _schema(("helpfulness",))])
def test_report_files(tmp_path, schema):
    directory, result = tmp_path / "new" / "report", _random_result(schema)
    write_report(directory, result, _losses(schema.names), {"base model": "x\ny"}, "{'k': '```'}")
    text = (directory / "report.md").read_text(encoding="utf-8")
    plots = ("loss.png", "predictions.png", *(["correlations.png"] if len(schema) > 1 else []))
    assert sorted(plots) == sorted(path.name for path in directory.glob("*.png"))
    for plot in plots:
        assert (directory / plot).read_bytes().startswith(PNG)
        assert f"({plot})" in text
    for part in (*schema.names, "average", "- base model: x y\n", "````json\n{'k': '```'}\n````"):
        assert part in text
    # What the result says first, then the table, the plots, the data, the settings.
    order = [*comparison_sentences(result), _table(result)[0], "Only 40 responses", *plots[:1], "- base model", "{'k'"]
    places = [text.index(part) for part in order]
    assert places == sorted(places)


def test_axes_are_the_attributes_own(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    write_report(tmp_path, _random_result(OWN), {}, {}, "{}")
    first, second = drawn[0].axes
    assert (list(first.get_xticks()), list(second.get_yticks())) == (list(range(1, 6)), list(range(1, 11)))
    assert first.get_xlim() == first.get_ylim() == pytest.approx((0.7, 5.3))
    assert second.get_xlim() == second.get_ylim() == pytest.approx((0.325, 10.675))
    assert any("Ranges differ" in sentence for sentence in comparison_sentences(_random_result(OWN)))


def test_few_rows_are_said_first():
    few, many = _random_result(count=64), _random_result(count=500)
    assert few_rows_note(few).startswith("Only 64 responses")
    assert "95% intervals" in format_table(few)
    assert format_table(few).startswith("Only 64 responses")
    assert few_rows_note(many) == ""
    assert format_table(many).startswith("attribute ")


def test_report_without_training_losses(tmp_path):
    (tmp_path / "loss.png").touch()  # of an earlier report
    write_report(tmp_path, _random_result(), {}, {}, "{}")
    assert not (tmp_path / "loss.png").exists()
    assert "loss.png" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_predictions_hold_no_nan(tmp_path):
    result = _result(
        [[1.0, np.nan], [np.inf, 9.0]], [[2, -100], [3, 4]], _schema("ab"), np.array([[1, 0], [1, 1]], bool)
    )
    write_report(tmp_path, result, _losses(("a", "b")), {}, "{}")
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
    plot_losses(own_losses(records, "regression"), tmp_path / "loss.png", "rating²")
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)


@pytest.mark.filterwarnings("error")
def test_report_of_an_empty_split(tmp_path):
    write_report(tmp_path, _result(np.empty((0, 1)), np.empty((0, 1))), _losses(("a",)), {}, "{}")
    assert (tmp_path / "predictions.jsonl").read_text() == ""


@pytest.mark.parametrize(
    "line",
    [
        b"garbage", b"", b"[]", b"3", b"null", b"\0\0\0", b'{"step": 2}', b'{"split": "train"}', b"\xff\xfe",
        b'{"step": "2", "split": "train"}', b'{"step": 2, "split": "train", "loss": "low"}',
        b'{"step": 2, "split": "train", "loss": 1' + b"0" * 400 + b"}",
        b"[" * 100_000,
    ],
)  # fmt: skip
def test_a_line_of_metrics_that_is_no_record_is_left_out(tmp_path, line):
    sound = b'{"step": 1, "split": "train", "loss": null}'
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([sound, line, sound, b""]))
    assert read_metrics(tmp_path / "metrics.jsonl") == [json.loads(sound)] * 2


def test_losses(tmp_path):
    lines = ['{"step": 1, "split": "train"}', '{"step": 2, "split": "train"}']
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"st']))
    assert read_metrics(tmp_path / "metrics.jsonl") == [json.loads(line) for line in lines]
    assert read_metrics(tmp_path / "missing.jsonl") == []
    write_json(tmp_path / "metrics.json", {"a": [float("nan"), 1.5, float("inf")]})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"a": [None, 1.5, None]}


def test_missing_matplotlib_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    with refused(SteerjaxError, "matplotlib", cure="pip install 'steerjax[plots]'"):
        require_plots()
    with pytest.raises(SteerjaxError):
        write_report(tmp_path / "report", _random_result(), _losses(), {}, "{}")
    assert not (tmp_path / "report").exists()


def test_import_loads_neither_matplotlib_nor_jax():
    code = "import sys, steerjax.report.page; assert not {'matplotlib', 'jax'} & set(sys.modules), 'imported too early'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plots_leave_pyplot_alone(tmp_path):
    code = (
        "import sys; from steerjax.report.plots import plot_losses; from steerjax.report.records import own_losses; "
        f"plot_losses(own_losses([], 'a'), {str(tmp_path / 'loss.png')!r}, 'nats'); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _two_objectives():
    own = {"regression/loss": 0.8, "bradley_terry/loss": 0.6}
    train = {"step": 1, "split": "train", "loss": 0.8 + 0.1 * 0.6, **own}
    return [train, {"step": 2, "split": "validation", "loss": 0.7 + 0.1 * 0.5, "regression/loss": 0.7,
                    "bradley_terry/loss": 0.5}]  # fmt: skip


@pytest.mark.parametrize(("records", "objective", "weight", "train", "validation"), [
    (_two_objectives(), "regression", 1.0, [[1, 0.8]], [[2, 0.7]]),
    (_two_objectives(), "bradley_terry", 0.1, [[1, 0.6]], [[2, 0.5]]),
    ([{"step": 3, "split": "train", "loss": 0.2}], "sft", 0.5, [[3, 0.4]], []),
    ([{"step": 3, "split": "train", "loss": 0.0}], "sft", 0.0, [], []),
    ([{"step": 3, "split": "train", "loss": None}], "sft", 1.0, [], []),
])  # fmt: skip
def test_a_loss_is_the_objectives_own_without_its_weight(records, objective, weight, train, validation):
    found = own_losses(records, objective, weight)
    assert found["train"].tolist() == [pytest.approx(point) for point in train]
    assert found["validation"].tolist() == [pytest.approx(point) for point in validation]


def test_each_objectives_plot_draws_its_own_loss(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    monkeypatch.setattr("steerjax.report.page._rendered", lambda *_: "")
    pairs = preference_result([[1.0, 0.0], [0.2, 0.4]], [1.0, 1.0], [[9, 5], [4, 7]], ["a", "b"])
    write_preference_report(tmp_path, pairs, own_losses(_two_objectives(), "bradley_terry", 0.1), {}, "{}")
    (axes,) = drawn[1].axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[0.6], [0.6], [0.5]]
    assert "nats" in axes.get_ylabel()


class Page(HTMLParser):
    """Tags with their attributes, and text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.said = [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.said += data


def test_the_html_page_is_one_file_with_all_that_the_markdown_has(tmp_path):
    result = _random_result()
    write_report(tmp_path, result, _losses(), {"base model": "<script>alert(1)</script>"}, '{"k": "</pre><b>"}')
    page = Page(tmp_path / "report.html")
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    plots = ("loss.png", "predictions.png", "correlations.png")
    assert [base64.b64decode(each["src"].removeprefix("data:image/png;base64,")) for each in images] == [
        (tmp_path / plot).read_bytes() for plot in plots
    ]
    for part in (*comparison_sentences(result), *_table(result)[:8], "<script>alert(1)</script>", "</pre><b>"):
        assert part in page.said, part
    assert not {"script", "b", "link"} & {tag for tag, _ in page.tags}
    fetched = [value for tag, attributes in page.tags for key, value in attributes.items() if key in ("src", "srcset")]
    assert all(value.startswith("data:") for value in fetched)
    assert [attributes["href"] for tag, attributes in page.tags if tag == "a"] == ["predictions.jsonl"]


def test_a_page_of_text_that_looks_like_a_plot(tmp_path):
    """A run's facts come from outside: what is not a plot of the folder is no picture."""
    (tmp_path / "x.png").write_bytes(PNG)
    facts = {"data": "![a](none.png) ![b](https://example.org/x.png) ![c](../x.png) ![d](/x.png)"}
    (tmp_path / "report").mkdir()
    write_page(tmp_path / "report", ["# Title"], facts, "{}")
    page = Page(tmp_path / "report/report.html")
    assert "img" not in {tag for tag, _ in page.tags}
    assert "Title" in page.said
