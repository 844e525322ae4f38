"""Pages side by side: which answers, and that text from outside stays text."""

import re
from html.parser import HTMLParser

import pytest

from steerjax.data.conversation import Conversation, Turn
from steerjax.evaluation.pages import QUESTIONS, side_by_side, write_pages
from steerjax.evaluation.steering_answers import SteeredAnswer
from steerjax.schema import HELPSTEER

pytestmark = pytest.mark.short
NEUTRAL = {"complexity": 2.0, "verbosity": 2.0}


def answer(prompt, text, predicted=None, cut=False, system=None, **requested):
    return SteeredAnswer(
        Conversation((Turn("user", prompt), Turn("assistant", text)), system), requested, predicted or {}, cut
    )


def grid(prompt="Why?"):
    return [answer(prompt, f"c{c} v{v}", complexity=c, verbosity=v) for v in (4, 0, 2) for c in (0, 4, 2)]


def test_the_lowest_and_the_highest_with_the_others_neutral():
    ((first, pairs),) = side_by_side(grid(), HELPSTEER, NEUTRAL)
    assert first.conversation.turns[0].content == "Why?"
    assert [(name, low.text, high.text) for name, low, high in pairs] == [
        ("complexity", "c0 v2", "c4 v2"), ("verbosity", "c2 v0", "c2 v4")
    ]  # fmt: skip
    without = [each for each in grid() if each.requested["verbosity"] != 2]  # any equal ones will do
    ((_, pairs),) = side_by_side(without, HELPSTEER, NEUTRAL)
    assert [(name, low.text, high.text) for name, low, high in pairs] == [
        ("complexity", "c0 v4", "c4 v4"), ("verbosity", "c2 v0", "c2 v4")
    ]  # fmt: skip


def test_nothing_to_put_side_by_side(tmp_path):
    single = [answer("p", "x", verbosity=0), answer("q", "y", verbosity=4)]
    assert write_pages(single, HELPSTEER, NEUTRAL, tmp_path) == {}
    assert not list(tmp_path.iterdir())


class Reader(HTMLParser):
    """Tags, and the text outside the style; tags that are not closed are an error."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text, self.links = [], [], "", []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href", "srcset", "action")]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data


HOSTILE = '<script>alert("1")</script> & <img src=x onerror=y> </div> ``` \n````\n# no heading'


def test_text_from_outside_stays_text(tmp_path):
    answers = [
        answer(HOSTILE, HOSTILE, {"verbosity": 0.25}, system="</p><b>be kind", complexity=2, verbosity=0),
        answer(HOSTILE, "\ud83d half", cut=True, system="</p><b>be kind", complexity=2, verbosity=4),
    ]
    pages = write_pages(answers, HELPSTEER, NEUTRAL, tmp_path)
    page, markdown = (tmp_path / name for name in pages)
    reader = Reader()
    reader.feed(page.read_text())
    reader.close()
    assert (reader.open, reader.links) == ([], [])
    assert not {"script", "img", "b", "link"} & set(reader.tags)
    assert reader.text.count(HOSTILE) == 2  # the question and an answer
    for said in ("verbosity 0", "verbosity 4", "predicted: verbosity 0.25", "cut at the limit"):
        assert said in reader.text
    assert not re.search(r"url\(|@import|https?:", page.read_text())
    text = markdown.read_text()
    assert text.count("`````text\n" + HOSTILE + "\n`````") == 1  # the question; the answer is a cell
    (row,) = [line for line in text.splitlines() if line.startswith("| \\<script")]
    assert re.search(r"(?<!\\)[<`#&]", row.replace("<br>", "")) is None
    assert row.count("<br>") == 2
    assert len(re.findall(r"(?<!\\)\|", row)) == 3
    outside = re.sub(r"(`{3,})text\n.*?\n\1", "", text, flags=re.S)
    assert "<script>" not in outside.replace("\\<script", "")
    assert "| verbosity 0 | verbosity 4 |" in outside


def test_a_long_page_says_that_it_is_cut(tmp_path):
    write_pages([each for n in range(QUESTIONS + 3) for each in grid(f"Why {n}?")], HELPSTEER, NEUTRAL, tmp_path)
    text = (tmp_path / "side_by_side.md").read_text()
    assert text.count("## Question ") == QUESTIONS
    assert f"The first {QUESTIONS} of {QUESTIONS + 3}" in text
