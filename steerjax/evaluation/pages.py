"""Pages that put answers to one question side by side: an attribute asked for at its lowest and its highest rating."""

import html
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from steerjax.evaluation.steering_answers import SteeredAnswer
from steerjax.files import write_text
from steerjax.report.page import fenced, html_page
from steerjax.schema import Schema

HTML, MARKDOWN = "side_by_side.html", "side_by_side.md"
QUESTIONS = 100  # on a page; the others are in the answers' file

_STYLE = """
.question { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 4px solid #0072B2; padding: .2rem 1rem }
.system { color: GrayText }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; margin: 1rem 0 }
.answer { border: 1px solid #8886; border-radius: 6px; padding: .6rem 1rem; min-width: 0 }
.text { white-space: pre-wrap; overflow-wrap: anywhere }
.facts { color: GrayText; font-size: .85rem; margin: 0 0 .6rem }
h2 { margin-top: 3rem }
h4 { margin: 0 }
@media (max-width: 40rem) { .pair { grid-template-columns: 1fr } }
"""

Pairs = list[tuple[str, SteeredAnswer, SteeredAnswer]]  # attribute, asked for at its lowest, at its highest


def request_words(request: Mapping[str, float]) -> str:
    """`helpfulness 4, verbosity 1`."""
    return ", ".join(f"{name} {value:g}" for name, value in request.items()) or "no ratings"


def side_by_side(
    answers: Sequence[SteeredAnswer], schema: Schema, neutral: Mapping[str, float]
) -> Iterator[tuple[SteeredAnswer, Pairs]]:
    """Of each prompt that has such pairs, an answer of it, and the pairs.

    The two of a pair differ in one requested rating; the others are the neutral ones where there are such answers.
    """
    prompts: dict[str, list[SteeredAnswer]] = {}
    for answer in answers:
        prompts.setdefault(answer.prompt, []).append(answer)
    for same in prompts.values():
        pairs = []
        for name in schema.names:
            groups: dict[tuple, dict[float, SteeredAnswer]] = {}
            for answer in same:
                others = {key: value for key, value in answer.requested.items() if key != name}
                if name in answer.requested:
                    group = groups.setdefault(tuple(sorted(others.items())), {})
                    group.setdefault(answer.requested[name], answer)  # of several samples the first
            wanted = tuple(sorted((key, value) for key, value in neutral.items() if key != name))
            usable = {others: group for others, group in groups.items() if len(group) > 1}
            if usable:
                group = usable.get(wanted) or next(iter(usable.values()))
                pairs.append((name, group[min(group)], group[max(group)]))
        if pairs:
            yield same[0], pairs


def write_pages(
    answers: Sequence[SteeredAnswer], schema: Schema, neutral: Mapping[str, float], folder: Path
) -> dict[str, str]:
    """The pages in the folder -> what they hold; none where no prompt has two requests that differ in one rating."""
    shown = list(side_by_side(answers, schema, neutral))
    if not shown:
        return {}
    note = f"Neutral request: {request_words(neutral)}. Each pair differs in the one rating that is named."
    if len(shown) > QUESTIONS:
        note += f" The first {QUESTIONS} of {len(shown)} questions."
    shown = shown[:QUESTIONS]
    write_text(folder / HTML, _html(shown, note), errors="backslashreplace")
    write_text(folder / MARKDOWN, _markdown(shown, note), errors="backslashreplace")
    what = "the same question at low and high ratings, side by side"
    return {HTML: what, MARKDOWN: f"{what}, as text"}


def _facts(answer: SteeredAnswer) -> str:
    predicted = {name: f"{value:.2f}" for name, value in answer.predicted.items()}
    told = ", ".join(f"{name} {value}" for name, value in predicted.items())
    facts = [f"{len(answer.text.split())} words", *(["cut at the limit of tokens"] if answer.cut else [])]
    return "; ".join([*facts, *([f"predicted: {told}"] if told else [])])


def _html(shown: Sequence[tuple[SteeredAnswer, Pairs]], note: str) -> str:
    """One file with its style; all text from outside is escaped."""
    parts = []
    for number, (first, pairs) in enumerate(shown, start=1):
        parts.append(f'<section id="q{number}"><h2>Question {number}</h2>')
        if first.conversation.system:
            parts.append(f'<p class="question system">{html.escape(first.conversation.system)}</p>')
        for turn in first.conversation.turns[:-1]:
            parts.append(f'<div class="question">{_who(turn.role)}{html.escape(turn.content)}</div>')
        for name, *both in pairs:
            parts.append(f'<h3>{html.escape(name)}</h3><div class="pair">')
            for answer in both:
                heading = html.escape(f"{name} {answer.requested[name]:g}")
                parts.append(
                    f'<div class="answer"><h4>{heading}</h4><p class="facts">{html.escape(_facts(answer))}</p>'
                    f'<div class="text">{html.escape(answer.text) or "<em>(empty)</em>"}</div></div>'
                )
            parts.append("</div>")
        parts.append("</section>")
    title = "The same question, steered"
    body = f"<h1>{title}</h1><p>{html.escape(note)}</p>\n" + "\n".join(parts)
    return html_page(title, body, _STYLE)


def _who(role: str) -> str:
    return "" if role == "user" else f"<strong>{html.escape(role)}:</strong> "


def _markdown(shown: Sequence[tuple[SteeredAnswer, Pairs]], note: str) -> str:
    """A table of two columns a pair. Questions stand in fences longer than any that they hold; answers are escaped."""
    parts = ["# The same question, steered", note]
    for number, (first, pairs) in enumerate(shown, start=1):
        parts.append(f"## Question {number}")
        parts += [fenced(f"(system) {first.conversation.system}", "text")] if first.conversation.system else []
        turns = first.conversation.turns[:-1]
        parts += [
            fenced(turn.content if len(turns) == 1 else f"({turn.role}) {turn.content}", "text") for turn in turns
        ]
        for name, *both in pairs:
            cells = [[f"{name} {answer.requested[name]:g}" for answer in both], ["---"] * len(both)]
            cells += [[_cell(_facts(answer)) for answer in both], [_cell(answer.text) or "(empty)" for answer in both]]
            parts.append("\n".join(f"| {' | '.join(row)} |" for row in cells))
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    """Text as a table's cell: nothing in it is Markdown, HTML or a link, and its lines stay apart."""
    escaped = re.sub(r"([\\`*_{}\[\]<>|&#~$@:]|(?<=www)\.)", r"\\\1", text.strip())
    return "<br>".join(escaped.splitlines())
