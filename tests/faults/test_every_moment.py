"""Commands that are killed before each thing that they do to a file, and once more as they go on.

A random moment seldom hits these; with a large model's files an instant of here is minutes.
"""

import random
import shutil
import signal
from functools import partial

import pytest

from tests.faults.forks import Forks
from tests.faults.moments import kinds
from tests.faults.test_interrupted_commands import content
from tests.faults.tiny_runs import differences, environment, write_recipe
from tests.iteration import test_iterate as iteration
from tests.reward_models import chat_folder, reward_folder, some_conversations, write_rows

PARTS = 8  # of the moments of a training run
pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("moments")


@pytest.fixture(scope="module")
def forks(folder, repository):
    found = Forks(environment(folder, repository))
    yield found
    found.close()


def _differences(content, ours, whole):
    """Names of what differs, but for where it lies and what this start computed of it, which reports say."""

    def told(value, folder):
        if not isinstance(value, bytes):
            return value
        return [line.replace(bytes(folder), b"") for line in value.splitlines() if b"computed" not in line]

    found, expected = ({name: told(value, out) for name, value in content(out).items()} for out in (ours, whole))
    return [name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)]


OTHER_CONTENT = partial(_differences, content)


class Sweep:
    """A command whose last argument is where it writes; `done` is what it says of an output that is whole."""

    def __init__(self, forks, folder, words, name="out", differ=OTHER_CONTENT, done=None):
        self.forks, self.folder, self.name, self.done = forks, folder, name, done
        self.words = list(map(str, words))
        self.differ = differ
        folder.mkdir()
        for attempt in ("first", "whole"):  # the first compiles
            self.whole, log = folder / attempt / name, folder / f"{attempt}.moments"
            status, said = self.run(self.whole, log=log)
            assert status == 0, said
        self.kinds = kinds(log)

    def run(self, output, log=None, moment=None):
        """Its exit status and what it said; the moments are logged, or it is killed at one."""
        output.parent.mkdir(exist_ok=True)
        said = self.folder / f"{output.parent.name}.log"
        said.write_text("")
        moments = [str(output.parent), str(log) if log else None, moment]
        return self.forks.wait(self.forks.start([*self.words, str(output)], said, moments)), said.read_text()

    def problems(self, moment, again):
        """After a kill at one moment, one at another, if it comes to that, and a start that nobody disturbs."""
        output = self.folder / "killed" / self.name
        shutil.rmtree(output.parent, ignore_errors=True)
        status, said = self.run(output, moment=moment)
        if status != -signal.SIGKILL:
            return [f"the moment did not come: {said}"]
        for killed_at in (again, None):
            status, said = self.run(output, moment=killed_at)
            if status != -signal.SIGKILL:
                break
        if status and not (self.done and self.done in said):
            return [f"status {status}: {said}"]
        left = [str(path) for path in output.parent.rglob("*") if ".partial-" in path.name or "-tmp" in path.name]
        return left + self.differ(output, self.whole)

    def check(self, tried, door, name, kinds_of, draw):
        """A kill at a moment of each of these kinds."""
        every, failed = [moment for found in self.kinds.values() for moment in found], {}
        for moments in kinds_of:
            moment, again = draw.choice(moments), draw.choice(every)
            if found := self.problems(moment, again):
                failed[moment, again] = found
            tried(door, name, 1, (moment, again) in failed)
        assert not failed


@pytest.fixture(scope="module")
def training(forks, folder):
    (data := folder / "recipe").mkdir()
    words = ("train", "--config", write_recipe(data), "--workdir")
    return Sweep(forks, folder / "train", words, differ=differences)


@pytest.mark.parametrize("part", range(PARTS))
def test_a_run_killed_at_every_moment(training, tried, part):
    kinds_of = list(training.kinds.values())[part::PARTS]
    training.check(tried, "killed at every moment", "train", kinds_of, random.Random(part))


@pytest.fixture(scope="module")
def commands(folder):
    """Words, name of the output, how it is compared, what is said of a whole one."""
    reward, chat, other = (
        reward_folder(folder / "reward"),
        chat_folder(folder / "chat"),
        chat_folder(folder / "o", seed=1),
    )
    rows = write_rows(folder / "rows.jsonl", some_conversations(12, longest=30))
    asked = write_rows(folder / "asked.jsonl", [{"prompt": f"Why {i}?"} for i in range(6)])
    rated = [{"prompt": f"Q {i}", "response": "a " * i, "helpfulness": i % 5, "verbosity": i % 3} for i in range(1, 13)]
    rated = write_rows(folder / "rated.jsonl", rated)
    sampler = iteration.model_folder(folder / "sampler", "chat")
    judge = iteration.model_folder(folder / "judge", "reward", **iteration.CLASSIFIER)
    prompts = write_rows(folder / "prompts.jsonl", [{"prompt": f"Name a prime above {n}."} for n in range(8)])
    recipe = folder / "iterate.py"
    recipe.write_text(iteration.RECIPE.format(chat=str(sampler)))
    template, there = ("--template", "extra_id"), "is there already"
    return {
        "annotate": (
            ("annotate", "--model", reward, *template, "--input", rows, "--chunk-rows", 2, "--output"), "o.jsonl",
        ),
        "generate": (
            ("generate", "--model", chat, *template, "--input", asked, "--max-new-tokens", 8, "--schema", "helpsteer",
             "--batch-size", 2, "--output"), "o.jsonl",
        ),
        "export": (("export", "--checkpoint", chat, *template, "--output"), "out", OTHER_CONTENT, there),
        "merge": (("merge", chat, other, *template, "--output"), "out", OTHER_CONTENT, there),
        "prepare": (("prepare", "helpsteer", "--input", "embedded:helpsteer2", "--output"), "o.jsonl"),
        "collect": (("collect", "tasks", "--answers", rated, "--output"), "out"),
        "evaluate": (("evaluate", "--suite", "attributes", "--model", judge, "--data", rated, "--output"), "out"),
        "iterate": (
            ("iterate", "--config", recipe, "--prompts", prompts, "--reward-model", judge, "--attributes",
             "helpfulness=1,verbosity=0", "--samples", 4, "--max-new-tokens", 16, "--workdir"), "work",
            partial(_differences, iteration.content),
        ),
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["annotate", "generate", "export", "merge", "prepare", "collect", "evaluate", "iterate"]
)
def test_a_command_killed_at_every_moment(commands, forks, folder, tried, name):
    sweep = Sweep(forks, folder / name, *commands[name])
    kinds_of = [moments for kind, moments in sweep.kinds.items() if "/iteration-N/run/" not in kind]  # as of a run
    sweep.check(tried, "killed at every moment", name, kinds_of, random.Random(name))
