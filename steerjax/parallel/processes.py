"""Several processes as one run: start, checks, barriers with a time limit, and one failure that ends all.

The processes talk through the key-value store of jax's coordination service, which process 0 holds. A thread in each
gives a sign of life every `BEAT` seconds and waits for news; process 0's looks for those that have gone silent. (The
service's own watch aborts with a stack trace that does not say who failed or why; it does so at once when process 0
dies, so each process also holds a connection to the service's port, whose end it sees as soon.)

Environment (and that of cluster.py):
    STEERJAX_START_SECONDS: how long to wait for all processes to start (300).
    STEERJAX_WAIT_SECONDS: longest wait at a barrier, and longest time in which no process gets on (3600).
    STEERJAX_CPU_DEVICES: virtual devices of a process on a CPU.
"""

import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress

import jax

from steerjax.errors import ConfigError, SteerjaxError, TrainingError
from steerjax.parallel.cluster import find_cluster, whole_number

BEAT = 2.0  # seconds between signs of life
LOST = 30.0  # seconds of silence after which a process is gone: long, as a thread may have to wait for Python's lock
MISSES = 5  # looks at the store that may fail one after the other
FIRST_GONE = "process 0 is gone (the connection to it broke): killed, out of memory, or its machine is down"
NEWS, DONE, ALIVE, LEFT = "steerjax/news", "done", "steerjax/alive/", "steerjax/left/"
# What a collective says when the process at its other end is gone.
PEER_LOST = re.compile(r"gloo|nccl|peer|socket|connection|unavailable|aborted|deadline", re.IGNORECASE)


class Processes:
    """The `count` processes of a run, seen from the one of this `index`; on its own, a process waits for nobody."""

    def __init__(self, index: int = 0, count: int = 1, client=None, coordinator: str = "", wait_seconds: int = 3600):
        self.index, self.count = index, count
        self._client, self._wait = client, wait_seconds
        self._place, self._moves, self._leaving = "start", 0, False
        self._used: Counter[str] = Counter()
        self._values: dict[int | str, tuple[object, float]] = {}  # see `_unchanged`
        self._others = range(1, count if index == 0 else 0)  # those that process 0 has heard of lately
        self._watch = threading.Thread(target=self._watch_others, daemon=True)
        if count > 1:
            self._watch.start()
            if index > 0:
                threading.Thread(target=self._hold_line, args=_address(coordinator), daemon=True).start()

    def at(self, place: str) -> None:
        """Says where this process is; an error about it will. Each call counts as getting on."""
        self._place = place
        self._moves += 1

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
        except jax.errors.JaxRuntimeError as error:
            late = sorted(set(range(self.count)) - self._read(folder).keys())
            if not late:
                raise
            raise TrainingError(
                f"'{name}': {self._last_seen(late, self._read(ALIVE))} did not come within {seconds:g} s\n"
                "  cure: look into its log; STEERJAX_WAIT_SECONDS gives it more time"
            ) from error
        if not facts:
            return
        found, said = [json.loads(value) for _, value in sorted(self._read(folder).items())], []
        for key in found[0]:
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
            if self.index == 0:
                self._tell(DONE)
            self._leaving = True
            self._watch.join()

    def fail(self, error: BaseException) -> None:
        """Prints the error, tells it to the others and ends this process; returns if the run is alone or finished."""
        if not self._watch.is_alive():
            return
        sys.stdout.flush()
        ours, text = isinstance(error, SteerjaxError), str(error)
        shown = text if ours else "".join(traceback.format_exception(error)).strip()
        _say(f"error: {self._name()}: {shown}")
        if not ours:
            if PEER_LOST.search(text):
                _say("it may be that another process is gone; looking for it ...")
                time.sleep(LOST + 3 * BEAT)  # the watch ends this process as soon as it knows who
            text = "\n".join(f"{type(error).__name__}: {text}".splitlines()[:3])
        self._leaving = True  # so that the watch does not say it again
        self._tell(f"{self._name()} failed: {text}")
        self._leave()

    def _read(self, folder: str) -> dict[int, str]:
        """Process -> what it has put into a folder of the store."""
        return {int(key.rsplit("/", 1)[1]): value for key, value in self._client.key_value_dir_get(folder)}

    def _tell(self, news: str) -> None:
        """Tells all processes why to end; the first to tell is heard."""
        with suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(NEWS, news)

    def _watch_others(self) -> None:
        news, missed = None, 0
        while news is None:
            try:
                news = self._beat()
                if news is None and self.index == 0 and (found := self._find_lost()):
                    self._tell(found)
                missed = 0
            except jax.errors.JaxRuntimeError:
                missed += 1
                if missed == MISSES or self._leaving:
                    news = FIRST_GONE
                time.sleep(BEAT)
        if news != DONE and not self._leaving:
            _say(f"error: {self._name()} ends, because {news}")
            self._leave()

    def _hold_line(self, host: str, port: int) -> None:
        """Ends this process once nobody listens at process 0's port; the service cuts a silent line every minute."""
        while not self._leaving:
            try:
                with socket.create_connection((host, port), timeout=5) as line:
                    line.settimeout(None)
                    while line.recv(4096):
                        pass
            except ConnectionRefusedError:
                if not self._leaving:
                    _say(f"error: {self._name()} ends, because {FIRST_GONE}")
                    os._exit(1)
            except ConnectionError:
                pass  # at once again: jax aborts as soon as it sees the same
            except OSError:  # not to be had: that proves nothing
                time.sleep(BEAT)

    def _beat(self) -> str | None:
        """Gives a sign of life, then waits up to BEAT seconds for news."""
        sign = f"{time.monotonic()}/{self._moves}/{self._place}"
        self._client.key_value_set(f"{ALIVE}{self.index}", sign, allow_overwrite=True)
        try:
            return self._client.blocking_key_value_get(NEWS, int(BEAT * 1000))
        except jax.errors.JaxRuntimeError as error:
            if not str(error).startswith("DEADLINE_EXCEEDED"):
                raise
            return None

    def _find_lost(self) -> str | None:
        """What process 0 sees in the signs of life: who has gone silent, or that nobody gets on."""
        signs = self._read(ALIVE)
        silent = [i for i in range(self.count) if self._unchanged(i, signs.get(i)) > LOST]
        self._others = [i for i in range(1, self.count) if i not in silent]
        if silent:
            who = self._last_seen(silent, signs)
            return f"{who} gave no sign of life for {LOST:g} s: killed, out of memory, or its machine is down"
        if self._unchanged("all", {i: sign.split("/", 1)[1] for i, sign in signs.items()}) > self._wait:
            names = ", ".join(f"process {i} is at '{_place(sign)}'" for i, sign in sorted(signs.items()))
            return f"no process got on for {self._wait:g} s: {names}"
        return None

    def _unchanged(self, key: int | str, value: object) -> float:
        """Seconds since `key` first had this value."""
        if key not in self._values or self._values[key][0] != value:
            self._values[key] = value, time.monotonic()
        return time.monotonic() - self._values[key][1]

    def _leave(self) -> None:
        """Ends this process at once; process 0, which holds the store, when the others have heard the news."""
        self._leaving = True
        with suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"{LEFT}{self.index}", "", allow_overwrite=True)
            for i in self._others:
                self._client.blocking_key_value_get(f"{LEFT}{i}", 10_000)
        os._exit(1)

    def _name(self, i: int | None = None) -> str:
        return f"process {self.index if i is None else i} of {self.count}"

    def _last_seen(self, numbers: Iterable[int], signs: Mapping[int, str]) -> str:
        return ", ".join(f"{self._name(i)} (last at '{_place(signs.get(i))}')" for i in numbers)


ALONE = Processes()


def _address(text: str) -> tuple[str, int]:
    """Host and port of `host:port`, `[::1]:port` too."""
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def _place(sign: str | None) -> str:
    return sign.split("/", 2)[2] if sign else "start"


def _say(text: str) -> None:
    """Past Python's buffers, whose locks a thread that is stuck may hold."""
    os.write(2, (text + "\n").encode())


@contextmanager
def connect(environment: Mapping[str, str] = os.environ) -> Iterator[Processes]:
    """Joins the run's other processes, if the environment names any; to be entered before jax looks for devices.

    When the block fails in one, all end, with an error that names it. Raises ConfigError: an environment without sense.
    """
    if environment.get("STEERJAX_CPU_DEVICES"):
        jax.config.update("jax_num_cpu_devices", whole_number(environment, "STEERJAX_CPU_DEVICES", 1))
    arguments = find_cluster(environment)
    if arguments is None:
        yield ALONE
        return
    processes = _start(arguments, environment)
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        yield processes
        processes.finish()
    except BaseException as error:
        processes.fail(error)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(*_) -> None:
    raise TrainingError("stopped by SIGTERM before it had anything to save")


def _start(arguments: dict, environment: Mapping[str, str]) -> Processes:
    """Starts jax.distributed; the process ends with a message where it cannot."""
    seconds = whole_number(environment, "STEERJAX_START_SECONDS", 1, "300")
    wait = whole_number(environment, "STEERJAX_WAIT_SECONDS", 1, "3600")
    # The preemption service would take SIGTERM for itself; training agrees on it with the step.
    jax.config.update("jax_enable_preemption_service", False)
    # When the wait is over jax aborts without saying what for, so ours ends first.
    timer = threading.Timer(seconds, _explain_start, (seconds,), arguments)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(initialization_timeout=seconds + 30, shutdown_timeout_seconds=60, **arguments)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"jax.distributed does not start: {error}\n  cure: see launch/README.md") from error
    finally:
        timer.cancel()
    from jax._src.distributed import global_state as state  # the store has no public name; Orbax reaches it this way

    return Processes(state.process_id, state.num_processes, state.client, state.coordinator_address, wait)


def _explain_start(seconds: int, coordinator_address: str = "", process_id: int = 0, num_processes: int = 0, **_):
    who, text = f"process {process_id} of {num_processes}", f"not all processes of the run started within {seconds} s"
    if coordinator_address:
        text = f"{who} waited {seconds} s, and not all {num_processes} processes have come"
        if process_id:
            try:
                socket.create_connection(_address(coordinator_address), timeout=5)
            except OSError:
                text = f"{who} did not reach STEERJAX_COORDINATOR {coordinator_address} within {seconds} s"
    _say(
        f"error: {text}\n  cure: look into the others' logs; is process 0 at that address, is the port open, has each "
        "process a number of its own? STEERJAX_START_SECONDS gives more time"
    )
    os._exit(1)
