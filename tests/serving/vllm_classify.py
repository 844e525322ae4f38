"""Runs in vLLM's environment: python vllm_classify.py MODEL CASES.json OUTPUT.json

CASES: {"ids": token ids of each conversation, "texts": the same as text}. OUTPUT: what `LLM.classify` says of both, and
the token ids that vLLM made of the texts.
"""

import json
import sys
from pathlib import Path


def main(model: str, cases: str, output: str) -> None:
    from vllm import LLM

    given = json.loads(Path(cases).read_text())
    llm = LLM(model=model, runner="pooling", dtype="float32")
    by_ids = llm.classify([{"prompt_token_ids": ids} for ids in given["ids"]])
    by_text = llm.classify(given["texts"])
    found = {
        "by_ids": [entry.outputs.probs for entry in by_ids],
        "by_text": [entry.outputs.probs for entry in by_text],
        "ids": [entry.prompt_token_ids for entry in by_text],
    }
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
