"""Requested and predicted ratings of one answer as a small plot: HTML that follows the page's width and colours."""

import html
from collections.abc import Mapping

from steerjax.inference.steering import Setting
from steerjax.schema import Attribute, Schema

STYLE = """
.ratings { display: grid; grid-template-columns: minmax(5.5em, max-content) 1fr max-content; gap: .35em .8em;
  align-items: center; font-size: .9em; margin: .2em 0 .4em; }
.ratings .name { overflow-wrap: anywhere; }
.ratings .track { position: relative; height: 1.3em; margin: 0 .6em; }
.ratings .track::before { content: ""; position: absolute; left: 0; right: 0; top: 50%;
  border-top: 2px solid var(--border-color-primary); }
.ratings .track span { position: absolute; top: 50%; transform: translate(-50%, -50%); }
.ratings .asked, .ratings-key .asked { width: 1em; height: 1em; border: 2px solid #0072B2; border-radius: 50%;
  box-sizing: border-box; }
.ratings .predicted, .ratings-key .predicted { width: .55em; height: .55em; background: #D55E00; border-radius: 50%; }
.ratings .numbers { font-variant-numeric: tabular-nums; text-align: right; }
.ratings-key { font-size: .85em; color: var(--body-text-color-subdued); display: flex; gap: .5em;
  align-items: center; flex-wrap: wrap; }
.ratings-key span { display: inline-block; }
"""
KEY = '<div class="ratings-key"><span class="asked"></span>requested <span class="predicted"></span>predicted</div>'


def ratings_plot(schema: Schema, setting: Setting, predicted: Mapping[str, float], judged: Schema) -> str:
    """A row for each attribute that was asked for and predicted, then those that were only predicted.

    Args:
        schema: of the chat model; its ranges stand where both models have the attribute.
        setting: what was asked for. predicted: of the reward model, whose schema is `judged`.
    """
    both = [attribute for attribute in schema.attributes if attribute.name in predicted]
    alone = [a for a in judged.attributes if a.name in predicted and a.name not in schema.names]
    rows = [_row(a, setting.get(a.name), predicted[a.name]) for a in (*both, *alone)]
    return f'<div class="ratings">{"".join(rows)}</div>{KEY}'


def _row(attribute: Attribute, asked: int | None, predicted: float) -> str:
    wanted = "left out" if asked is None else f"{asked}"
    numbers = f"{wanted} &rarr; {predicted:.2f}"
    said = (
        f"{attribute.name}: requested {wanted}, predicted {predicted:.2f}, of {attribute.low:g} to {attribute.high:g}"
    )
    marks = "" if asked is None else f'<span class="asked" style="left:{_place(attribute, asked):.1f}%"></span>'
    marks += f'<span class="predicted" style="left:{_place(attribute, predicted):.1f}%"></span>'
    name = f'<div class="name">{html.escape(attribute.name)}</div>'
    track = f'<div class="track" role="img" aria-label="{html.escape(said)}" title="{html.escape(said)}">{marks}</div>'
    return f'{name}{track}<div class="numbers">{numbers}</div>'


def _place(attribute: Attribute, rating: float) -> float:
    """Percent along the range; a prediction beyond it stands at its end, and its number says so."""
    inside = min(attribute.high, max(attribute.low, rating))
    return 100 * (inside - attribute.low) / (attribute.high - attribute.low)
