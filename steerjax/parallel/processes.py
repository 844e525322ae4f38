"""Several processes as one run: barriers that compare and have a time limit, and one failure that ends all.

They talk through the key-value store of jax's coordination service, which process 0 holds: a thread in each gives signs
of life and looks for news, process 0's for those that fell silent or stay behind. (The service's own watch aborts
without saying who failed or why, and at once when process 0 dies; so each also holds a connection to its port, whose
end it sees as soon. A process 0 that was stopped ends no connection and answers no call: a second thread sees that.)

Environment, beside that of cluster.py: STEERJAX_START_SECONDS (300), how long to wait for all to start;
STEERJAX_WAIT_SECONDS (3600), the longest wait at a barrier; STEERJAX_CPU_DEVICES, virtual devices a process on a CPU.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import jax
from jax._src.distributed import State, global_state  # the store has no public name; Orbax reaches it so
from jax.errors import JaxRuntimeError

from steerjax.errors import ConfigError, SteerjaxError, TrainingError, machine_errors
from steerjax.parallel.cluster import find_cluster, whole_number

BEAT = 2.0  # seconds between signs of life
LOST = 27.0  # seconds of silence after which a process is gone: long, as a thread may have to wait for Python's lock
MISSES = 5  # looks at the store that may fail one after the other
FIRST_GONE = "process 0 is gone (the connection to it broke): killed, out of memory, or its machine is down"
FIRST_SILENT = f"process 0 did not answer for {LOST:g} s: stopped, or its machine is down"
NEWS, ALIVE = "steerjax/news/", "steerjax/alive/"


class Processes:
    """The `count` processes of a run, seen from the one of this `index`; on its own, a process waits for nobody."""

    def __init__(self, state: State, wait_seconds: int = 3600):
        self.index, self.count, self._client = state.process_id, state.num_processes, state.client
        self._wait, self._place, self._passed, self._leaving = wait_seconds, "start", 0, False
        self._answers = 0
        self._name, self._used = f"process {self.index} of {self.count}", Counter()
        self._watch = threading.Thread(target=self._watch_others, daemon=True)
        if self.count > 1:
            self._watch.start()
        if self.index > 0:
            line = state.coordinator_address.rsplit(":", 1)
            threading.Thread(target=self._hold_line, args=line, daemon=True).start()
            threading.Thread(target=self._watch_first, daemon=True).start()

    def at(self, place: str) -> None:
        """Says where this process is; an error about it will. All come to the same places, in the same order."""
        self._place, self._passed = place, self._passed + 1

    def barrier(self, name: str, seconds: float | None = None) -> None:
        """Waits until all processes are here. Raises TrainingError: names those that have not come in time."""
        self.agree(name, {}, seconds)

    def agree(self, name: str, facts: Mapping, seconds: float | None = None) -> None:
        """A barrier to which every process brings what must be the same everywhere: nested plain data.

        Raises:
            TrainingError: names the processes that have not come in time, or that differ, and in what.
        """
        if self.count == 1:
            return
        self.at(name)
        self._used[name] += 1
        seconds = seconds or self._wait
        folder = f"steerjax/barrier/{name}/{self._used[name]}/"
        leaves = jax.tree_util.tree_leaves_with_path(dict(facts), is_leaf=lambda x: x is None)
        flat = {jax.tree_util.keystr(path, simple=True, separator="."): repr(leaf) for path, leaf in leaves}
        self._client.key_value_set(f"{folder}{self.index}", json.dumps(flat))
        try:
            self._client.wait_at_barrier(folder, int(seconds * 1000))
        except JaxRuntimeError as error:
            late = sorted(set(range(self.count)) - self._read(folder).keys())
            if not late:
                raise
            cure = "look into its log; STEERJAX_WAIT_SECONDS gives it more time"
            said = f"'{name}': {self._last_seen(late)} did not come within {seconds:g} s\n  cure: {cure}"
            raise TrainingError(said) from error
        found, said = [json.loads(own) for _, own in sorted(self._read(folder).items())] if facts else [], []
        for key in flat:
            values = [own.get(key) for own in found]
            usual = Counter(values).most_common(1)[0][0]  # process 0's, if it is a draw
            said += [f"process {i} has {key} = {v}, the others {usual}" for i, v in enumerate(values) if v != usual]
        if said:
            cure = "the same command, code and files on every machine"
            raise TrainingError(f"'{name}': the processes do not do the same. {'; '.join(said[:5])}\n  cure: {cure}")

    def finish(self) -> None:
        """Waits for all at the end; from here on each may leave, and nobody is missed."""
        if self._watch.is_alive():
            self.barrier("end")
            self._leaving = True
            self._watch.join()

    def fail(self, error: BaseException) -> None:
        """Prints the error, tells it to all and ends with them; returns if the run is alone or finished."""
        if not self._watch.is_alive():
            return
        sys.stdout.flush()
        if isinstance(error, JaxRuntimeError):  # it may be a collective whose other end is gone: then the watch ends us
            _say(f"{self._name} cannot go on; waiting until it is known whether another process is gone ...")
            self._watch.join(LOST + 3 * BEAT)
        shown = text = str(error)
        if not isinstance(error, SteerjaxError):
            shown = "".join(traceback.format_exception(error)).strip()
            text = "\n".join(f"{type(error).__name__}: {text}".splitlines()[:3])
        _say(f"error: {self._name}: {shown}")
        self._tell(f"{self._name} failed: {text}")
        self._watch.join()

    def _tell(self, news: str) -> None:
        """Tells all processes, this one too, why to end."""
        with suppress(JaxRuntimeError):
            self._client.key_value_set(f"{NEWS}{self.index}", news, allow_overwrite=True)

    def _end(self, why: str | None) -> None:
        """Ends this process, unless it is leaving; process 0, which holds the store, when the others could hear why."""
        if not self._leaving:
            if not why.startswith(f"{self._name} failed"):  # it has said so itself
                _say(f"error: {self._name} ends, because {why}")
            if self.index == 0:
                time.sleep(3 * BEAT)
            os._exit(1)

    def _watch_others(self) -> None:
        news, missed, seen = None, 0, {}
        while news is None and not self._leaving:
            try:
                sign = f"{time.monotonic()}/{self._passed}/{self._place}"
                self._client.key_value_set(f"{ALIVE}{self.index}", sign, allow_overwrite=True)
                if self.index == 0:
                    self._find_lost(seen)
                news, missed = next(iter(self._read(NEWS).values()), None), 0
                self._answers += 1
            except JaxRuntimeError:
                missed += 1
                news = FIRST_GONE if missed == MISSES else None
            if news is None:
                time.sleep(BEAT)
        self._end(news)

    def _watch_first(self) -> None:
        """Ends this process where process 0, though its machine holds the connections, answers nothing."""
        answers, silent = 0, 0.0
        while not self._leaving and silent < LOST:
            time.sleep(BEAT)  # in beats, so that no time counts in which this process is the stopped one
            answers, silent = self._answers, silent + BEAT if answers == self._answers else 0.0
        self._end(FIRST_SILENT)

    def _hold_line(self, host: str, port: str) -> None:
        """Ends this process once nobody listens at process 0's port; the service cuts a silent line every minute."""
        while not self._leaving:
            try:
                with socket.create_connection((host.strip("[]"), int(port)), timeout=5) as line:
                    line.settimeout(None)
                    while line.recv(4096):
                        pass
            except ConnectionRefusedError:
                self._end(FIRST_GONE)
            except ConnectionError:
                pass  # at once again: jax aborts as soon as it sees the same
            except OSError:  # not to be had: that proves nothing
                time.sleep(BEAT)

    def _find_lost(self, seen: dict) -> None:
        """Tells who is silent for too long, or stays behind the others; `seen`: each one's last sign and the place it
        passed last, and since when."""
        now = time.monotonic()
        for i, sign in (dict.fromkeys(range(self.count), "") | self._read(ALIVE)).items():
            for kind, value in (("sign", sign), ("passed", _passed(sign))):
                if (kind, i) not in seen or seen[kind, i][0] != value:
                    seen[kind, i] = value, now
        if silent := [i for i in range(self.count) if now - seen["sign", i][1] > LOST]:
            why = f"gave no sign of life for {LOST:g} s: killed, stopped, out of memory, or its machine is down"
            self._tell(f"{self._last_seen(silent)} {why}")
            return
        passed = {i: seen["passed", i] for i in range(self.count)}
        last = min(value for value, _ in passed.values())
        behind = [i for i, (value, _) in passed.items() if value == last]
        if len(behind) < self.count and all(now - since > self._wait for _, since in passed.values()):
            why = f"did not get on for {self._wait:g} s (STEERJAX_WAIT_SECONDS), and the others wait"
            self._tell(f"{self._last_seen(behind)} {why}\n  cure: look into its log, and at its disk and network")

    def _read(self, folder: str) -> dict[int, str]:
        """Process -> what it has put into a folder of the store."""
        return {int(key.rsplit("/", 1)[1]): value for key, value in self._client.key_value_dir_get(folder)}

    def _last_seen(self, numbers: list[int]) -> str:
        places = {i: sign.split("/", 2)[2] for i, sign in self._read(ALIVE).items()}
        return ", ".join(f"process {i} of {self.count} (last at '{places.get(i, 'start')}')" for i in numbers)


ALONE = Processes(State())


def _passed(sign: str) -> int:
    """How many places the process of a sign of life has come to."""
    return int(sign.split("/")[1]) if sign else 0


def _say(text: str) -> None:
    """Past Python's buffers, whose locks a thread that is stuck may hold."""
    with suppress(OSError):  # the disk of the log is full
        os.write(2, (text + "\n").encode())


@contextmanager
def connect(environment: Mapping[str, str] = os.environ) -> Iterator[Processes]:
    """Joins the run's other processes, if there are any, before jax looks for devices; a block that fails ends all.

    Raises:
        ConfigError: an environment without sense.
    """
    if environment.get("STEERJAX_CPU_DEVICES"):
        jax.config.update("jax_num_cpu_devices", whole_number(environment, "STEERJAX_CPU_DEVICES", 1))
    arguments = find_cluster(environment)
    if arguments is None:
        yield ALONE
        return
    processes = _start(arguments, environment)
    try:
        with machine_errors():
            yield processes
        processes.finish()
    except BaseException as error:
        processes.fail(error)
        raise


def _start(arguments: dict, environment: Mapping[str, str]) -> Processes:
    """Starts jax.distributed; the process ends with a message where it cannot."""
    seconds = whole_number(environment, "STEERJAX_START_SECONDS", 1, "300")
    wait = whole_number(environment, "STEERJAX_WAIT_SECONDS", 1, "3600")
    # The preemption service would take SIGTERM for itself; training agrees on it with the step.
    jax.config.update("jax_enable_preemption_service", False)

    def give_up() -> None:
        cure = "look into all logs: does each run, with a number of its own, and reach process 0's address and port?"
        _say(
            f"error: not all processes started within {seconds} s (STEERJAX_START_SECONDS) {arguments}\n  cure: {cure}"
        )
        os._exit(1)

    timer = threading.Timer(seconds, give_up)  # jax would abort a little later, without saying what for
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(initialization_timeout=seconds + 30, shutdown_timeout_seconds=60, **arguments)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"jax.distributed does not start: {error}\n  cure: see launch/README.md") from error
    finally:
        timer.cancel()
    return Processes(global_state, wait)
