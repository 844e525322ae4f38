"""FastChat's own code on the output of `steerjax evaluate --suite mt_bench`: prompts, ratings and means are equal.

python benchmarks/oracles/mt_bench.py DIR --questions FILE --references FILE --prompts FILE

The files are FastChat's question.jsonl, gpt-4.jsonl and judge_prompts.jsonl. In an environment of its own with fschat
0.2.36 and pandas; openai and anthropic, which it imports, are stood in for. Each question of DIR/rows.jsonl goes
through `run_judge_single` with the judge's stored text in place of a call, and the judgments through
`display_result_single`. Needs a complete output, judged by a language model.
"""

import argparse
import contextlib
import importlib.machinery
import importlib.util
import io
import json
import sys
import tempfile
from pathlib import Path

for name in ("openai", "anthropic"):
    sys.modules[name] = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, None))

from fastchat.llm_judge import common, show_result  # noqa: E402
from fastchat.llm_judge.gen_judgment import NEED_REF_CATS, make_judge_single  # noqa: E402


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", required=True)
    parser.add_argument("--references", required=True)
    parser.add_argument("--prompts", required=True)
    options = parser.parse_args()
    result = json.loads((options.folder / "results.json").read_text())
    questions = {row["question_id"]: row for row in read(options.questions)}
    references = {row["question_id"]: row for row in read(options.references)}
    prompts = {row["name"]: row for row in read(options.prompts)}
    judges = make_judge_single("gpt-4", prompts)  # a name that FastChat calls by way of openai
    kept = {}
    for row in read(options.folder / "judgments.jsonl"):
        if row["judge"][0] == result["judge"]:
            kept[row["question_id"], row["turn"]] = row
    said, made = {}, []

    def answered(model, conv, temperature, max_tokens, api_dict=None):
        said["messages"] = conv.to_openai_api_messages()
        return said["text"]

    common.chat_completion_openai = answered
    crashes = 0
    for answer in read(options.folder / "rows.jsonl"):
        question = questions[answer["question_id"]]
        kind = "math" if question["category"] in NEED_REF_CATS else "default"
        reference = references[answer["question_id"]] if kind == "math" else None
        for turn, judge in ((1, judges[kind]), (2, judges[f"{kind}-mt"])):
            ours = kept[answer["question_id"], turn]
            said["text"] = ours["judgment"]
            try:
                score, prompt, _ = common.run_judge_single(question, answer, judge, reference, multi_turn=turn == 2)
            except SyntaxError:
                crashes, score, prompt = crashes + 1, -1, ours["user_prompt"]
            assert prompt == ours["user_prompt"], (answer["question_id"], turn)
            assert score == ours["score"], (answer["question_id"], turn, score, ours["score"])
            assert [m["content"] for m in said["messages"]] == [judge.prompt_template["system_prompt"], prompt]
            made.append({"model": "ours", "score": score, "turn": turn})
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file, contextlib.redirect_stdout(io.StringIO()) as shown:
        file.write("".join(json.dumps(row) + "\n" for row in made))
        file.flush()
        asked = {"input_file": file.name, "bench_name": "mt_bench", "judge_model": "", "model_list": None}
        show_result.display_result_single(argparse.Namespace(**asked))
    means = [float(line.split()[-1]) for line in shown.getvalue().splitlines() if line.startswith("ours")]
    names = ("turn 1", "turn 2", "average")
    for name, mean in zip(names, means, strict=True):
        print(f"{name}: FastChat {mean:.6f}, ours {result['figures'][f'MT-Bench/{name}']['value']:.6f}")
        assert abs(mean - result["figures"][f"MT-Bench/{name}"]["value"]) < 1e-6
    print(f"{len(made)} prompts and ratings are equal ({crashes} on which FastChat ends with an error)")


if __name__ == "__main__":
    main()
