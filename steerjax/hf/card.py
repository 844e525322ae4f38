"""The model card of an export: README.md, from what the model and its provenance say."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from steerjax.hf.description import ModelDescription
from steerjax.hf.tokenizer_files import special_tokens

_EMBEDDED = {"embedded:helpsteer": "nvidia/HelpSteer", "embedded:helpsteer2": "nvidia/HelpSteer2"}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")

_LOAD_REWARD = """\
```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForSequenceClassification.from_pretrained(MODEL)
messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
ratings = model(**inputs).logits[0].tolist()
print({name: ratings[index] for index, name in model.config.id2label.items()})
```

```
vllm serve MODEL --runner pooling
curl localhost:8000/classify -H 'Content-Type: application/json' -d '{"messages": [
  {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}'
```

The ratings come in the order of the attributes, in vLLM as `probs`. They are no probabilities: no softmax is applied.
"""
_LOAD_CHAT = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL)
messages = [{{"role": "user", "content": "Hi"}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True,{argument} return_tensors="pt", return_dict=True
)
answer = model.generate(**inputs, max_new_tokens=256)[0, inputs["input_ids"].shape[1]:]
print(tokenizer.decode(answer, skip_special_tokens=True))
```

```
vllm serve MODEL
curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{{
  "messages": [{{"role": "user", "content": "Hi"}}]{request}}}'
```
"""


def model_card(description: ModelDescription, *, evaluation: Mapping[str, Mapping[str, float]] | None = None) -> str:
    """README.md with its YAML head. What the provenance does not say is not claimed.

    Args:
        description: its provenance may be empty.
        evaluation: metrics of the run, by attribute and name of the metric.
    """
    reward = description.kind == "reward"
    provenance = description.provenance
    schema = description.schema.attributes if description.schema is not None else ()
    what = f"A reward model that predicts {len(schema)} ratings of a response" if reward else "A chat model"
    steers = " whose chat template takes the wanted ratings of the answer" if schema and not reward else ""
    parts = [
        _front_matter(provenance, reward),
        f"# {'Reward model' if reward else 'Chat model'}\n\n{what}{steers}. Exported by steerjax.\n",
        _section("Base model and recipe", _recipe(provenance)),
        _section("Data", _data(provenance.get("data") or {})),
        _section("Attributes", _attributes(schema, description.default_ratings, reward)),
        _section("Metrics", _metrics(evaluation or {})),
        "## Use\n\n`MODEL` is this folder or its name on the hub.\n",
        _LOAD_REWARD if reward else _chat_use(schema),
        _section("How a conversation is written", _rendering(description, reward)),
        "## Licences\n\nCheck the licences of the base model and of each data file before you use or pass this model"
        " on:\nboth may restrict it. `license: other` above stands for them until you have.\n",
    ]
    return "\n".join(part for part in parts if part)


def _section(title: str, lines: list[str]) -> str:
    return f"## {title}\n\n" + "\n".join(lines) + "\n" if lines else ""


def _public(source: str) -> str:
    """A hub id or packaged name as it is, a path without its folders."""
    if _is_hub_id(source) or source.startswith(("hub:", "embedded:")):
        return source
    return Path(source).name


def _is_hub_id(source: str) -> bool:
    return bool(_HUB_ID.fullmatch(source)) and not Path(source).exists()


def _front_matter(provenance: Mapping, reward: bool) -> str:
    base = provenance.get("base_model")
    entries: dict[str, object] = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if reward else "text-generation",
        "license": "other",
        "license_name": "see-base-model-and-data",
        "tags": ["steerjax", "steerlm", "reward-model" if reward else "conversational"],
    }
    if isinstance(base, str) and _is_hub_id(base):
        entries["base_model"] = base
    datasets = {_EMBEDDED.get(source) or _hub_dataset(source) for source in provenance.get("data") or {}} - {None}
    if datasets:
        entries["datasets"] = sorted(datasets)
    # JSON is YAML.
    return "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in entries.items()) + "---\n"


def _hub_dataset(source: str) -> str | None:
    return source.removeprefix("hub:").split(":")[0] if source.startswith("hub:") else None


def _recipe(provenance: Mapping) -> list[str]:
    base = provenance.get("base_model")
    lines = []
    if base is not None:
        lines.append("- base model: " + ("none" if base == "random" else f"`{_public(str(base))}`"))
    config = provenance.get("config") or {}
    optimizer, batch, train = (config.get(key) or {} for key in ("optimizer", "batch", "train"))
    if optimizer:
        frozen = f", first {optimizer['frozen_layers']} layers frozen" if optimizer.get("frozen_layers") else ""
        lines.append(
            f"- AdamW, learning rate {optimizer['learning_rate']:g} ({optimizer['schedule']}, "
            f"{optimizer['warmup_steps']} warm-up steps), weight decay {optimizer['weight_decay']:g}{frozen}"
        )
    if batch:
        lines.append(f"- batch: {batch['rows']} packed rows of {batch['row_length']} tokens")
    if train:
        lines.append(f"- length: {train['steps']} steps" if train["steps"] else f"- length: {train['epochs']:g} epochs")
    if provenance.get("step") is not None:
        lines.append(f"- checkpoint of step {provenance['step']}")
    if provenance.get("steerjax"):
        lines.append(f"- steerjax {provenance['steerjax']}; the whole configuration is in `steerjax.json`")
    return lines


def _data(hashes: Mapping[str, str]) -> list[str]:
    if not hashes:
        return []
    rows = [f"| `{_public(source)}` | `{digest}` |" for source, digest in hashes.items()]
    return ["| source | sha256, or the fingerprint of a hub data set |", "|---|---|", *rows]


def _attributes(schema: tuple, defaults: Mapping[str, float] | None, reward: bool) -> list[str]:
    if not schema:
        return []
    head, rule = "| | attribute | range | meaning |", "|---|---|---|---|"
    default = [""] * len(schema)
    if defaults and not reward:
        head, rule = head + " default |", rule + "---|"
        default = [f" {defaults[a.name]:g} |" if a.name in defaults else " none |" for a in schema]
    rows = [
        f"| {index} | {a.name} | {a.low:g} to {a.high:g} | {a.meaning} |{default[index]}"
        for index, a in enumerate(schema)
    ]
    return [head, rule, *rows]


def _metrics(evaluation: Mapping[str, Mapping[str, float]]) -> list[str]:
    names = list(dict.fromkeys(name for metrics in evaluation.values() for name in metrics))
    if not names:
        return []
    rows = [
        " | ".join([f"| {attribute}", *(f"{metrics[name]:.3f}" if name in metrics else "" for name in names)]) + " |"
        for attribute, metrics in evaluation.items()
    ]
    return [" | ".join(["| attribute", *names]) + " |", "|---" * (len(names) + 1) + "|", *rows]


def _chat_use(schema: tuple) -> str:
    if not schema:
        return _LOAD_CHAT.format(argument="", request="")
    asked = json.dumps({schema[-1].name: schema[-1].low}).replace(".0}", "}")
    request = f',\n  "chat_template_kwargs": {{"attributes": {asked}}}'
    return _LOAD_CHAT.format(argument=f" attributes={asked},", request=request)


def _rendering(description: ModelDescription, reward: bool) -> list[str]:
    template = description.template
    stop = template.end.strip()
    lines = [
        f"`chat_template.jinja` (`{template.name}`) writes it; the tokenizer adds nothing to that, no BOS either.",
        "A text that contains a control string of the template or of the tokenizer is refused.",
    ]
    if reward:
        lines.append(f"The ratings are read at the end of the last response, after {json.dumps(template.reward_end)}.")
        return lines
    if description.schema is not None:
        lines.append(
            f"The ratings stand before the answer, after {json.dumps(template.assistant + template.label[0])}; a rating"
            " of null leaves its attribute out."
        )
        lines.append(
            "Ratings of earlier answers go beside `attributes`, in `message_attributes`: a list, one entry a message,"
            " null for none."
        )
    if special_tokens(description.tokenizer, template).get("eos_token") != stop:
        lines.append(f"The end of an answer is no single token: give the server `stop` {json.dumps(stop)}.")
    return lines
