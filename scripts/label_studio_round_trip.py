"""Simulated raters in a real Label Studio: tasks -> its API -> its export -> rows, each rating compared.

python3 -m venv venv-ls && venv-ls/bin/pip install label-studio
python scripts/label_studio_round_trip.py --label-studio venv-ls/bin/label-studio --work DIR
    [--sklearn PYTHON]         a Python with scikit-learn, whose kappa has to equal ours
    [--save DIR]               key.json, export.json and given.json, which tests/collection reads
    [--keep-serving]           to look at the project in a browser

Label Studio runs on 127.0.0.1 with its data in DIR. Three people sign up and rate through the API as the browser does,
with a session each (it works whichever kind of token a version has). Among what they do is a skipped task, a task rated
twice by one, tasks rated by two, one that nobody rates.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree as xml

import httpx

from steerjax.data.loading import load_conversations
from steerjax.data.readers import iter_rows
from steerjax.schema import Schema, schema_from_json

ATTRIBUTES = [  # radio buttons; a range that does not begin at 0, with XML's own characters; numbers that are typed
    ["helpfulness", "0", "4", "how well it does what was asked"],
    ["clarity", "1", "5", 'is it "easy" <to> read & follow?'],
    ["depth", "0", "100"],
    ["cost", "-0.5", "2.5"],
]
PASSWORD = "round-trip-1"


class Rater:
    """Somebody with a session."""

    def __init__(self, url: str, name: str):
        self.http = httpx.Client(base_url=url, timeout=120, follow_redirects=True, trust_env=False)
        self.email = f"{name}@example.com"

    def enter(self, how: str) -> "Rater":
        """`signup` or `login`."""
        self.http.get(f"/user/{how}/").raise_for_status()
        form = {"email": self.email, "password": PASSWORD, "csrfmiddlewaretoken": self.http.cookies["csrftoken"]}
        self.http.post(f"/user/{how}/", data=form, headers={"Referer": str(self.http.base_url)}).raise_for_status()
        self.number = self.call("GET", "/api/current-user/whoami")["id"]
        return self

    def call(self, method: str, path: str, body=None, **options):
        headers = {"X-CSRFToken": self.http.cookies.get("csrftoken", ""), "Referer": str(self.http.base_url)}
        reply = self.http.request(method, path, json=body, headers=headers, **options)
        assert reply.is_success, f"{method} {path}: {reply.status_code} {reply.text[:2000]}"
        return reply.json() if reply.content else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--label-studio", required=True)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--sklearn")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--keep-serving", action="store_true")
    o = parser.parse_args()
    o.work.mkdir(parents=True)  # not there yet: an older database would have other users
    project = write_tasks(o.work)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = serve(o.label_studio, o.work, port)
    try:
        url = f"http://127.0.0.1:{port}"
        wait(url, server)
        given, export = rate(url, project)
    finally:
        if o.keep_serving:
            print(f"serving {url}; user admin@example.com, password {PASSWORD}; process {server.pid}")
        else:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)
    file = o.work / "export.json"
    file.write_text(json.dumps(export, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    run("ratings", "--key", str(project / "key.json"), "--export", str(file), "--output", str(o.work / "ratings"))
    check(o.work, project, given)
    if o.sklearn:
        compare_kappas(o.work, o.sklearn)
    if o.save:
        o.save.mkdir(parents=True, exist_ok=True)
        key = json.loads((project / "key.json").read_text(encoding="utf-8"))
        kept = {"key": key, "export": [anonymous(task) for task in export], "given": given}
        for name, value in kept.items():
            (o.save / f"{name}.json").write_text(json.dumps(value) + "\n", encoding="utf-8")
    print("the round trip holds")


def run(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "steerjax", "collect", *arguments], check=True)


def write_tasks(work: Path) -> Path:
    """A project of two sources' answers to six prompts, of which one answer is the same."""
    text = 'Rivers &amp; trees: <b>not bold</b>, "quoted", {braces}, 你好 🙂\n\n  a second line, http://example.com/x'
    rows = []
    for n in range(6):
        turns = [{"role": "user", "content": f"Question {n}? <script>alert(1)</script>"}]
        if n % 2:
            turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}, *turns]
        for source in ("model A", "model B"):
            said = "The same." if n == 5 else f"Answer {n} of {'one' if source[-1] == 'A' else 'two'}. {text}"
            answer = [*turns, {"role": "assistant", "content": said}]
            about = {"id": f"{n}{source[-1]}", "source": source, "system": "Be kind." if n == 0 else None}
            rows.append({**about, "turns": answer})
    answers, project = work / "answers.jsonl", work / "project"
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    own = [part for attribute in ATTRIBUTES for part in ("--attribute", *attribute)]
    run("tasks", "--answers", str(answers), "--output", str(project), *own)
    assert "model" not in (project / "tasks.json").read_text(), "a task says where its answer is from"
    return project


def serve(command: str, work: Path, port: int) -> subprocess.Popen:
    data = work / "label-studio"
    data.mkdir()
    quiet = {"COLLECT_ANALYTICS": "False", "LATEST_VERSION_CHECK": "False", "SENTRY_DSN": "", "FRONTEND_SENTRY_DSN": ""}
    place = {"LABEL_STUDIO_BASE_DATA_DIR": str(data.resolve()), "DJANGO_DB": "sqlite", "HOME": str(data.resolve())}
    line = [command, "start", "--no-browser", "--data-dir", str(data.resolve()), "--internal-host", "127.0.0.1",
            "--port", str(port), "--username", "admin@example.com", "--password", PASSWORD]  # fmt: skip
    unset = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    log = (work / "label-studio.log").open("wb")
    return subprocess.Popen(line, env=unset | quiet | place, stdout=log, stderr=log, start_new_session=True)


def wait(url: str, server: subprocess.Popen, seconds: float = 900) -> None:
    """Its first start makes the database, which takes minutes."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert server.poll() is None, "Label Studio ended; see label-studio.log"
        try:
            if httpx.get(f"{url}/health", timeout=5, trust_env=False).is_success:
                return
        except httpx.HTTPError:
            time.sleep(2)
    raise TimeoutError("Label Studio does not answer; see label-studio.log")


def rate(url: str, project: Path) -> tuple[dict, list]:
    """What each rater gave, {task name: {rater: {attribute: rating}}}, and the export."""
    random.seed(0)
    admin = Rater(url, "admin").enter("login")
    raters = [Rater(url, f"rater{n}").enter("signup") for n in (1, 2, 3)]
    config = (project / "labelling_config.xml").read_text(encoding="utf-8")
    number = admin.call("POST", "/api/projects/", {"title": "round trip", "label_config": config})["id"]
    admin.call("POST", f"/api/projects/{number}/import", json.loads((project / "tasks.json").read_text()))
    admin.call("PATCH", f"/api/projects/{number}/", {"maximum_annotations": len(raters)})
    tasks = admin.call("GET", f"/api/tasks/?project={number}&page_size=100")["tasks"]
    key = json.loads((project / "key.json").read_text())
    assert len(tasks) == len(key["tasks"])
    schema = schema_from_json(key["attributes"], "key.json", ValueError)
    radio = {element.get("name") for element in xml.fromstring(config).iter("Choices")}
    given: dict = {}
    for place, task in enumerate(sorted(tasks, key=lambda task: task["data"]["task"])):
        truth = random.random()
        for n, rater in enumerate(raters):
            path = f"/api/tasks/{task['id']}/annotations/"
            if place == 0 or (place == 1 and n == 2):  # nobody; only two
                continue
            if place == 2 and n == 1:
                rater.call("POST", path, {"result": [], "was_cancelled": True})
                continue
            ratings = draw(schema, truth, n)
            if place == 3 and n == 0:  # a first try, which does not count
                rater.call("POST", path, {"result": results(draw(schema, 1 - truth, n), radio)})
                time.sleep(0.05)
            rater.call("POST", path, {"result": results(ratings, radio), "lead_time": 12.5})
            if n == 0:  # the others are still asked for it
                assert raters[1].call("GET", f"/api/projects/{number}/next/")["id"]
            given.setdefault(task["data"]["task"], {})[str(rater.number)] = ratings
    return given, admin.call("GET", f"/api/projects/{number}/export?exportType=JSON&download_all_tasks=true")


def draw(schema: Schema, truth: float, rater: int) -> dict[str, float]:
    """Raters differ by chance, the last also by being harsh."""
    ratings = {}
    for a in schema.attributes:
        value = a.low + (a.high - a.low) * (truth + random.gauss(0, 0.12) - 0.2 * (rater == 2))
        digits = None if float(a.low).is_integer() else 1
        ratings[a.name] = round(min(a.high, max(a.low, value)), digits)
    return ratings


def results(ratings: dict[str, float], radio: set[str]) -> list[dict]:
    """As the browser sends them."""
    found = []
    for name, value in ratings.items():
        kind, said = ("choices", {"choices": [str(value)]}) if name in radio else ("number", {"number": value})
        about = {"from_name": name, "to_name": "response", "type": kind, "value": said, "origin": "manual"}
        found.append({"id": f"{random.getrandbits(40):010x}", **about})
    return found


def check(work: Path, project: Path, given: dict) -> None:
    """Every rating came back under its rater, with the source of its answer, and is read for training."""
    file = str(work / "ratings" / "ratings.jsonl")
    rows = {row["id"]: row for _, row in iter_rows(file)}
    key = json.loads((project / "key.json").read_text())
    assert rows.keys() == given.keys(), (rows.keys(), given.keys())
    schema = schema_from_json(key["attributes"], "key.json", ValueError)
    for name, row in rows.items():
        for attribute in schema.names:
            back = dict(zip(row["raters"][attribute], row[attribute], strict=True))
            assert back == {rater: ratings[attribute] for rater, ratings in given[name].items()}, (name, back)
        assert [s["source"] for s in row["sources"]] == [s["source"] for s in key["tasks"][name]["sources"]]
    read = load_conversations([file], schema).conversations
    assert len(read) == len(rows)
    for conversation in read:
        mean = conversation.turns[-1].ratings["clarity"]
        theirs = [ratings["clarity"] for ratings in given[conversation.id].values()]
        assert abs(mean - sum(theirs) / len(theirs)) < 1e-12


def compare_kappas(work: Path, python: str) -> None:
    """Pairwise kappas of the whole ratings are scikit-learn's."""
    ours = json.loads((work / "ratings" / "results.json").read_text())["pairs"]
    rows = [row for _, row in iter_rows(str(work / "ratings" / "ratings.jsonl"))]
    asked = []
    for pair in ours:
        name, (one, other) = pair["attribute"], pair["raters"]
        by = [dict(zip(row["raters"][name], row[name], strict=True)) for row in rows]
        asked.append([[each[one], each[other]] for each in by if one in each and other in each])
    code = (
        "import json, sys; from sklearn.metrics import cohen_kappa_score as kappa\n"
        "out = []\n"
        "for pairs in json.load(sys.stdin):\n"
        "    x, y = ([round(10 * v) for v in side] for side in zip(*pairs))\n"
        "    out.append(kappa(x, y, labels=list(range(min(x + y), max(x + y) + 1)), weights='quadratic'))\n"
        "print(json.dumps(out))"
    )
    reply = subprocess.run([python, "-c", code], input=json.dumps(asked), capture_output=True, text=True, check=True)
    worst = max(abs(theirs - pair["kappa"]) for theirs, pair in zip(json.loads(reply.stdout), ours, strict=True))
    assert worst < 1e-12, worst
    print(f"{len(ours)} pairwise kappas equal scikit-learn's, at most {worst:.1e} apart")


def anonymous(task: dict) -> dict:
    """Without what an installation says of itself."""
    for annotation in task["annotations"]:
        annotation["unique_id"] = "0"
    return task


if __name__ == "__main__":
    main()
