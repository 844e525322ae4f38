"""Greedy decoding: tokens a second beside transformers' `generate` and vLLM.

    python benchmarks/decoding.py --model SMOLLM2 [--peer PYTHON] [--vllm PYTHON] [--batch 8] [--prompts 64 --stop 1]
    python benchmarks/decoding.py --model SMOLLM2 --samples 8

A turn answers the next --prompts prompts of HelpSteer (20 to 400 tokens; as many as --batch where it is not given) with
--tokens new tokens each, in float32 (on a GPU in bfloat16), in batches of --batch. Nobody stops at an end of turn, so
that all draw as many tokens; with --stop 1 all do, and transformers answers batches of prompts sorted by length. Texts
are compared. The share of a plain read: what a step would take that reads all weights once with two threads, over what
it takes. Our warm-up answers every turn's prompts, as a cache of another size (powers of two) is compiled anew, in
seconds.

With --samples, a turn draws so many answers to one prompt of 300 to 400 tokens: together, or each on its own (`apart`).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from safetensors import safe_open
from turns import add_options, in_turn, machine, report, serve, workers


def our_turns(model: Path, folder: Path, o: argparse.Namespace, apart: bool = False):
    """Writes turns.jsonl, the token ids of each turn's prompts; a turn answers the next."""
    from steerjax.bundle import open_bundle
    from steerjax.data.conversation import Conversation, Turn
    from steerjax.data.readers import iter_rows
    from steerjax.inference.engine import Engine, Request
    from steerjax.inference.steering import Sampling
    from steerjax.schema import HELPSTEER

    bundle, count, turns = open_bundle(model, template="chatml"), o.prompts, o.turns + 1
    engine = Engine(bundle, HELPSTEER, Sampling(max_new_tokens=o.tokens), o.samples or o.batch)
    if not o.stop:
        engine.stops.tokens.clear()
        engine.stops._several = engine.stops._several[:0]
    renderer = bundle.renderer(HELPSTEER)
    texts = dict.fromkeys(row["prompt"] for _, row in iter_rows("embedded:helpsteer"))
    prompts = [renderer.render(Conversation((Turn("user", text),)), generation_prompt=True).tokens for text in texts]
    prompts = [prompt for prompt in prompts if (300 if o.samples else 20) <= len(prompt) <= 400]
    parts = [[prompts[(n * count + i) % len(prompts)] for i in range(count)] for n in range(turns)]
    with (folder / "turns.jsonl").open("w") as file:
        for part in parts:
            print(json.dumps({"prompts": [prompt.tolist() for prompt in part], "ends": engine.stops.tokens}), file=file)

    def answers(part: list) -> list[list[int]]:
        if apart:
            asked = [[Request((prompt,))] for prompt in part for _ in range(o.samples)]
        else:
            asked = [[Request((prompt,), o.samples or 1) for prompt in part]]
        return [list(answer.ids) for job in asked for found in engine.run(job) for answer in found]

    warm = False

    def turn() -> dict:
        nonlocal warm
        if not warm:
            [answers(part) for part in parts[1:]]
        warm, ids = True, answers(parts.pop(0))
        return {"drawn": sum(map(len, ids)), "ids": ids}

    return turn


def peer_turns(model: Path, folder: Path, batch: int, tokens: int, stop: bool):
    import torch
    from padded import DEVICE, PRECISION
    from transformers import LlamaForCausalLM

    llama = LlamaForCausalLM.from_pretrained(model, dtype=PRECISION).eval().to(DEVICE)
    turns = [json.loads(line) for line in (folder / "turns.jsonl").open()]
    llama.generation_config.eos_token_id = ends = turns[0]["ends"] if stop else None

    def answer(prompts: list[list[int]]) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids, mask = (torch.zeros(len(prompts), longest, dtype=torch.long) for _ in range(2))
        for row, prompt in enumerate(prompts):  # padded on the left
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        out = llama.generate(
            ids.to(DEVICE), attention_mask=mask.to(DEVICE), max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
        return [ended(row, ends or []) for row in out[:, longest:].tolist()]

    @torch.inference_mode()
    def turn() -> dict:
        prompts = turns.pop(0)["prompts"]
        order, answers = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), {}
        for at in range(0, len(order), batch):
            part = order[at : at + batch]
            answers |= zip(part, answer([prompts[i] for i in part]), strict=True)
        ids = [answers[i] for i in range(len(prompts))]
        return {"drawn": sum(map(len, ids)), "ids": ids}

    return turn


def ended(ids: list[int], ends: list[int]) -> list[int]:
    """Up to its first end, included."""
    return ids[: next((place + 1 for place, index in enumerate(ids) if index in ends), len(ids))]


def vllm_turns(model: Path, folder: Path, batch: int, tokens: int, stop: bool):
    from vllm import LLM, SamplingParams

    turns = [json.loads(line) for line in (folder / "turns.jsonl").open()]
    llm = LLM(str(model), dtype="float32", max_num_seqs=batch, max_model_len=1024, enable_prefix_caching=False)
    ends = turns[0]["ends"] if stop else None
    how = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=not stop, stop_token_ids=ends, detokenize=False)

    def turn() -> dict:
        prompts = [{"prompt_token_ids": prompt} for prompt in turns.pop(0)["prompts"]]
        ids = [list(out.outputs[0].token_ids) for out in llm.generate(prompts, how, use_tqdm=False)]
        return {"drawn": sum(map(len, ids)), "ids": ids}

    return turn


def plain_read(size: int) -> float:
    """Seconds in which two threads read so many bytes of memory."""
    parts = [np.ones(size // 8, np.float32) for _ in range(2)]

    def read() -> float:
        begun = time.perf_counter()
        threads = [threading.Thread(target=part.sum) for part in parts]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        return time.perf_counter() - begun

    return min(read() for _ in range(10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, 5)
    add = parser.add_argument
    add("--vllm", metavar="PYTHON", help="that has vllm")
    add("--batch", type=int, default=1)
    add("--prompts", type=int, help="in a turn")
    add("--tokens", type=int, default=128)
    add("--stop", type=int, default=0, help="1: answers stop at the end of turn")
    add("--samples", type=int, default=0, help="of one prompt, together and apart")
    o = parser.parse_args()
    o.prompts = o.prompts or o.batch
    if o.worker:
        name, folder = o.worker[0], Path(o.worker[1])
        if name in ("steerjax", "apart"):
            serve(our_turns(o.model, folder, o, name == "apart"))
        else:
            peer = vllm_turns if name == "vllm" else peer_turns
            serve(peer(o.model, folder, o.batch, o.tokens, o.stop))
        return
    keys = ("model", "batch", "tokens", "turns", "prompts", "stop", "samples")
    with tempfile.TemporaryDirectory() as scratch:
        peers = ["apart"] if o.samples else ["transformers"] + ["vllm"] * bool(o.vllm)
        commands = workers(__file__, peers, o, keys, scratch)
        if o.samples:
            commands["apart"][0] = commands["steerjax"][0]
        if o.vllm:
            commands["vllm"][0] = o.vllm
        found = in_turn(commands, o.turns, {})
    ids = {name: [turn.pop("ids") for turn in one["turns"]] for name, one in found.items()}
    for one in found.values():
        one["warm_up"].pop("ids")
    drawn = statistics.median(turn["drawn"] for turn in found["steerjax"]["turns"])
    name = f"decoding_{o.samples}_samples" if o.samples else f"decoding_{o.batch}" + "_stop" * bool(o.stop)
    report(name, found, "steerjax", "tokens", drawn, {key: vars(o)[key] for key in keys[1:]})
    for peer in ids.keys() - {"steerjax"}:
        pairs = [(a, b) for x, y in zip(ids["steerjax"], ids[peer], strict=True) for a, b in zip(x, y, strict=True)]
        print(f"texts: {sum(a == b for a, b in pairs)} of {len(pairs)} are {peer}'s, token for token")
    if o.samples or "gpu" in machine():
        return
    with safe_open(o.model / "model.safetensors", "np") as file:
        size = 4 * sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118 - no mapping
    step = statistics.median(turn["seconds"] for turn in found["steerjax"]["turns"]) / drawn * o.batch
    print(
        f"a plain read of the weights is {plain_read(size) / step:.0%} of the time of a token a row, prompts included"
    )


if __name__ == "__main__":
    main()
