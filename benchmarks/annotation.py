"""Rating responses: responses a second beside transformers and PyTorch.

    python benchmarks/annotation.py --model SMOLLM2 [--peer PYTHON] [--vllm PYTHON]

A turn rates the responses to the next --prompts prompts of HelpSteer in float32, with a model of SmolLM2's widths and
--layers layers. steerjax renders, packs and rates as `annotate` does. The peer, LlamaForSequenceClassification, gets
token ids that are ready, in batches of 8 padded to the longest: as the responses come (`padded`), or sorted by length
(`sorted`). `--vllm` names an environment with vLLM (peers.sh makes one). It gets the same token ids, all of a turn at
once, and caches prefixes: it computes a prompt once too. Predictions are compared.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from training import first_layers
from turns import add_options, in_turn, report, serve, workers


def our_turns(folder: Path, prompts: int, turns: int):
    """Writes turns.jsonl, the token ids of each turn's responses; a turn rates the next."""
    import itertools

    from steerjax.bundle import open_bundle
    from steerjax.data.loading import load_conversations
    from steerjax.inference.scorer import Scorer, predict
    from steerjax.schema import HELPSTEER

    bundle = open_bundle(folder / "start")
    scorer = Scorer(bundle)
    renderer = bundle.renderer(scorer.schema)
    found = load_conversations(["embedded:helpsteer"], HELPSTEER).conversations
    groups = [list(group) for _, group in itertools.groupby(found, key=lambda c: c.turns[0].content)]
    parts = [[c for group in groups[n * prompts : (n + 1) * prompts] for c in group] for n in range(turns)]
    with (folder / "turns.jsonl").open("w") as file:
        for part in parts:
            print(json.dumps([renderer.reward_tokens(c, 1)[0].tolist() for c in part]), file=file)
    number = 0

    def turn() -> dict:
        nonlocal number
        part = parts[number]
        number += 1
        _, predicted, _ = predict(scorer, part, [[1]] * len(part), skip=False)
        return {"examples": len(part), "predicted": predicted.tolist()}

    return turn


def peer_turns(folder: Path, ordered: bool):
    import torch
    from padded import BATCH, DEVICE, PRECISION, padded, rewards
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification.from_pretrained(folder / "start", dtype=PRECISION).eval().to(DEVICE)
    parts = [json.loads(line) for line in (folder / "turns.jsonl").open()]
    number = 0

    @torch.inference_mode()
    def turn() -> dict:
        nonlocal number
        texts = parts[number]
        number += 1
        order = sorted(range(len(texts)), key=lambda i: len(texts[i])) if ordered else list(range(len(texts)))
        predicted = [None] * len(texts)
        for first in range(0, len(order), BATCH):
            some = order[first : first + BATCH]
            found = rewards(model, *padded([texts[i] for i in some])).tolist()
            for i, ratings in zip(some, found, strict=True):
                predicted[i] = ratings
        return {"examples": len(texts), "predicted": predicted}

    return turn


def vllm_turns(folder: Path):
    from vllm import LLM

    llm = LLM(str(folder / "start"), runner="pooling", dtype="float32", enable_prefix_caching=True)
    parts = [json.loads(line) for line in (folder / "turns.jsonl").open()]
    number = 0

    def turn() -> dict:
        nonlocal number
        texts = parts[number]
        number += 1
        found = llm.classify([{"prompt_token_ids": text} for text in texts], use_tqdm=False)
        return {"examples": len(texts), "predicted": [one.outputs.probs for one in found]}

    return turn


def make_turn(name: str, folder: Path, o: argparse.Namespace):
    """The turn of a worker."""
    if name == "steerjax":
        return our_turns(folder, o.prompts, o.turns + 1)
    return vllm_turns(folder) if name == "vllm" else peer_turns(folder, name == "sorted")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, 5)
    add = parser.add_argument
    add("--layers", type=int, default=30)
    add("--prompts", type=int, default=10, help="of a turn; HelpSteer's sample has 120")
    add("--vllm", metavar="PYTHON", help="that has vLLM: compare with it too")
    add("--only", default="", help="steerjax and some of padded, sorted, vllm, with commas")
    o = parser.parse_args()
    if o.worker:
        serve(make_turn(o.worker[0], Path(o.worker[1]), o))
        return
    with tempfile.TemporaryDirectory() as scratch:
        first_layers(o.model, Path(scratch) / "start", o.layers)
        commands = workers(__file__, ("padded", "sorted"), o, ("turns", "prompts"), scratch)
        if o.vllm:
            commands["vllm"] = [o.vllm, *commands["sorted"][1:-2], "vllm", scratch]
        if o.only:
            commands = {name: commands[name] for name in ("steerjax", *o.only.split(","))}
        found = in_turn(commands, o.turns, {})
    said = {name: [np.array(turn.pop("predicted")) for turn in one["turns"]] for name, one in found.items()}
    for one in found.values():
        one["warm_up"].pop("predicted")
    examples = sum(turn["examples"] for turn in found["steerjax"]["turns"]) / o.turns
    name = "annotation_vllm" if o.only == "vllm" else "annotation"
    report(name, found, "steerjax", "responses", examples, {k: vars(o)[k] for k in ("layers", "prompts", "turns")})
    for name in said.keys() - {"steerjax"}:
        apart = max(np.abs(a - b).max() for a, b in zip(said["steerjax"], said[name], strict=True))
        print(f"predictions: {name} differs by at most {apart:.1e}")


if __name__ == "__main__":
    main()
