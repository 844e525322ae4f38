"""The model card of an export: README.md, from what the model and its provenance say. Its text: `model_card.jinja`."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from steerjax.hf.description import Description
from steerjax.hf.tokenizer_files import special_tokens

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_TEXT = Path(__file__).with_name("model_card.jinja")
_EMBEDDED = {"embedded:helpsteer": "nvidia/HelpSteer", "embedded:helpsteer2": "nvidia/HelpSteer2"}


def model_card(
    description: Description,
    *,
    evaluation: Mapping[str, Mapping[str, float]] | None = None,
    name: str = "model",
    results: Sequence["EvalResult"] = (),
) -> str:
    """README.md with its YAML head. What is not known is not claimed.

    `evaluation` is attribute -> metric -> value, for the card's table; `results` (huggingface_hub's) are the head's
    `model-index`, under the model's `name`.
    """
    from huggingface_hub import ModelCard, ModelCardData

    reward, template, provenance = description.kind == "reward", description.template, description.provenance
    attributes = description.schema.attributes if description.schema else ()
    base, data = provenance.get("base_model"), provenance.get("data") or {}
    sets = {hub_id(source) for source in data}
    head = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification" if reward else "text-generation",
        license="other",
        license_name="see-base-model-and-data",
        tags=["steerjax", "steerlm", "reward-model" if reward else "conversational"],
        base_model=base if base and _is_hub_id(base) else None,
        datasets=sorted(sets - {None}) or None,
        model_name=name if results else None,
        eval_results=list(results) or None,
    )
    stop = template.end.strip()
    card = ModelCard.from_template(
        head,
        template_path=str(_TEXT),
        reward=reward,
        rates=description.writes_ratings,
        attributes=attributes,
        defaults=None if reward else description.default_ratings,
        base=base and ("none" if base == "random" else f"`{public(base)}`"),
        provenance=provenance,
        data={public(source): digest for source, digest in data.items()},
        metrics=list(dict.fromkeys(name for found in (evaluation or {}).values() for name in found)),
        evaluation=evaluation,
        template=template,
        stop=stop if special_tokens(description.tokenizer, template).get("eos_token") != stop else None,
        asked=json.dumps({attributes[-1].name: attributes[-1].labels[0]}) if attributes else None,
        quoted=json.dumps,
    )
    return card.content.rstrip() + "\n"


def _is_hub_id(source: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source)) and not Path(source).exists()


def hub_id(source: str) -> str | None:
    """OWNER/NAME of a source of data that is on the hub."""
    return "/".join(re.split("[/:@]", source)[1:3]) if source.startswith("hub:") else _EMBEDDED.get(source)


def public(source: str) -> str:
    """A hub id or packaged name as it is, a path without its folders."""
    return source if _is_hub_id(source) or source.startswith(("hub:", "embedded:")) else Path(source).name
