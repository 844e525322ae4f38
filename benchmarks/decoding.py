"""Greedy decoding: tokens a second beside transformers' `generate`.

    python benchmarks/decoding.py --model SMOLLM2 [--peer PYTHON] [--batch 8]

A turn answers the next --batch prompts of HelpSteer (20 to 400 tokens) with --tokens new tokens each, in float32.
Neither side stops at an end of turn, so that both draw as many tokens. Texts are compared.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from turns import add_options, in_turn, report, serve, workers


def our_turns(model: Path, folder: Path, batch: int, tokens: int, turns: int):
    """Writes turns.jsonl, the token ids of each turn's prompts; a turn answers the next."""
    from steerjax.bundle import open_bundle
    from steerjax.data.conversation import Conversation, Turn
    from steerjax.data.readers import iter_rows
    from steerjax.inference.engine import Engine, Request
    from steerjax.inference.steering import Sampling
    from steerjax.schema import HELPSTEER

    bundle = open_bundle(model, template="chatml", dtype="float32")
    engine = Engine(bundle, HELPSTEER, Sampling(max_new_tokens=tokens), batch)
    engine.stops.tokens.clear()
    engine.stops._several = engine.stops._several[:0]
    renderer = bundle.renderer(HELPSTEER)
    texts = dict.fromkeys(row["prompt"] for _, row in iter_rows("embedded:helpsteer"))
    prompts = [renderer.render(Conversation((Turn("user", text),)), generation_prompt=True).tokens for text in texts]
    prompts = [prompt for prompt in prompts if 20 <= len(prompt) <= 400]
    parts = [[prompts[(n * batch + i) % len(prompts)] for i in range(batch)] for n in range(turns)]
    with (folder / "turns.jsonl").open("w") as file:
        for part in parts:
            print(json.dumps([prompt.tolist() for prompt in part]), file=file)
    number = 0

    def turn() -> dict:
        nonlocal number
        part = parts[number]
        number += 1
        answers = [answer for (answer,) in engine.run([Request((prompt,)) for prompt in part])]
        return {"drawn": sum(len(a.ids) for a in answers), "ids": [list(a.ids) for a in answers]}

    return turn


def peer_turns(model: Path, folder: Path, tokens: int):
    import torch
    from transformers import LlamaForCausalLM

    llama = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    llama.generation_config.eos_token_id = None
    parts = [json.loads(line) for line in (folder / "turns.jsonl").open()]
    number = 0

    @torch.inference_mode()
    def turn() -> dict:
        nonlocal number
        prompts = parts[number]
        number += 1
        longest = max(map(len, prompts))
        ids, mask = (torch.zeros(len(prompts), longest, dtype=torch.long) for _ in range(2))
        for row, prompt in enumerate(prompts):  # padded on the left
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        out = llama.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return {"drawn": len(prompts) * tokens, "ids": out[:, longest:].tolist()}

    return turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, 5)
    add = parser.add_argument
    add("--batch", type=int, default=1)
    add("--tokens", type=int, default=128)
    o = parser.parse_args()
    if o.worker:
        name, folder = o.worker[0], Path(o.worker[1])
        ours = name == "steerjax"
        serve(
            our_turns(o.model, folder, o.batch, o.tokens, o.turns + 1)
            if ours
            else peer_turns(o.model, folder, o.tokens)
        )
        return
    with tempfile.TemporaryDirectory() as scratch:
        commands = workers(__file__, ("transformers",), o, ("model", "batch", "tokens", "turns"), scratch)
        found = in_turn(commands, o.turns, {"JAX_PLATFORMS": "cpu"})
    ids = {name: [turn.pop("ids") for turn in one["turns"]] for name, one in found.items()}
    for one in found.values():
        one["warm_up"].pop("ids")
    settings = {key: vars(o)[key] for key in ("batch", "tokens", "turns")}
    report(f"decoding_{o.batch}", found, "steerjax", "tokens", o.batch * o.tokens, settings)
    pairs = [(a, b) for x, y in zip(*ids.values(), strict=True) for a, b in zip(x, y, strict=True)]
    print(f"texts: {sum(a == b for a, b in pairs)} of {len(pairs)} are equal, token for token")


if __name__ == "__main__":
    main()
