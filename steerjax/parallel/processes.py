"""Several processes as one run: start, checks, barriers with a time limit, and one failure that ends all.

The processes talk through the key-value store of jax's coordination service, which process 0 holds. A thread in each
gives a sign of life every `BEAT` seconds and waits for news; process 0's looks for those that have gone silent. The
service has a watch of its own, but it aborts with a stack trace that does not say who failed or why. It does so at once
when process 0 dies, so each process also holds a connection to process 0 whose end it sees as soon.

Environment (and that of cluster.py):
    STEERJAX_START_SECONDS: how long to wait for all processes to start (300).
    STEERJAX_WAIT_SECONDS: longest wait at a barrier, and longest time in which no process gets on (3600).
    STEERJAX_CPU_DEVICES: virtual devices of a process on a CPU.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Iterator, Mapping

import jax

from steerjax.errors import ConfigError, SteerjaxError, TrainingError
from steerjax.parallel.cluster import find_cluster, whole_number

BEAT = 2.0  # seconds between signs of life
LOST = 30.0  # seconds of silence after which a process is gone: long, as a thread may have to wait for Python's lock
MISSES = 5  # looks at the store that may fail one after the other
GRACE = 10.0  # seconds in which the others hear from process 0 why it ends
FIRST_GONE = "process 0 is gone (the connection to it broke): killed, out of memory, or its machine is down"
NEWS, DONE = "steerjax/news", "done"
# What a collective says when the process at its other end is gone.
PEER_LOST = re.compile(r"gloo|nccl|peer|socket|connection|unavailable|aborted|deadline", re.IGNORECASE)


class Processes:
    """The processes of a run, seen from one of them; on its own, a process waits for nobody.

    Attributes:
        index: of this process.
        count: of all.
    """

    def __init__(
        self, index: int = 0, count: int = 1, client=None, coordinator: str = "", wait_seconds: float = 3600.0
    ):
        self.index, self.count = index, count
        self._client, self._wait = client, wait_seconds
        self._place, self._moves = "start", 0
        self._used: Counter[str] = Counter()
        self._leaving = False
        self._moved = time.monotonic()
        self._places: dict[int, str] = {}
        self._seen = dict.fromkeys(range(count), ("", self._moved))  # last sign of life, and when it was new
        self._watch = threading.Thread(target=self._watch_others, name="steerjax-watch", daemon=True)
        if count > 1:
            self._watch.start()
            self._hold_line(coordinator.rsplit(":", 1)[0].strip("[]"))

    def at(self, place: str) -> None:
        """Says where this process is; an error about it will. Each call counts as getting on."""
        self._place = place
        self._moves += 1

    def barrier(self, name: str, seconds: float | None = None) -> None:
        """Waits until all processes are here.

        Raises:
            TrainingError: names those that have not come in time.
        """
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
        seconds = self._wait if seconds is None else seconds
        folder = f"steerjax/barrier/{name}/{self._used[name]}/"
        self._client.key_value_set(folder + str(self.index), json.dumps(_flat(facts)))
        try:
            self._client.wait_at_barrier(folder, int(seconds * 1000))
        except jax.errors.JaxRuntimeError as error:
            late = sorted(set(range(self.count)) - self._read(folder).keys())
            if not late:
                raise
            signs = self._read("steerjax/alive/")
            where = ", ".join(f"process {i} of {self.count} (last at '{_place(signs.get(i))}')" for i in late)
            raise TrainingError(
                f"'{name}': {where} did not come within {seconds:g} s\n"
                "  cure: look into its log; STEERJAX_WAIT_SECONDS gives it more time"
            ) from error
        if facts:
            _check_same(name, {i: json.loads(value) for i, value in self._read(folder).items()})

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
        _say(f"error: process {self.index} of {self.count}: {shown}")
        if not ours:
            if PEER_LOST.search(text):
                _say("it may be that another process is gone; looking for it ...")
                time.sleep(LOST + 3 * BEAT)  # the watch ends this process as soon as it knows who
            text = "\n".join(f"{type(error).__name__}: {text}".splitlines()[:3])
        self._leaving = True  # so that the watch does not say it again
        self._tell(f"process {self.index} of {self.count} failed: {text}")
        self._leave()

    def _read(self, folder: str) -> dict[int, str]:
        """Process -> what it has put into a folder of the store."""
        return {int(key.rsplit("/", 1)[1]): value for key, value in self._client.key_value_dir_get(folder)}

    def _tell(self, news: str) -> None:
        """Tells all processes why to end; the first to tell is heard."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
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
            _say(f"error: process {self.index} of {self.count} ends, because {news}")
            self._leave()

    def _hold_line(self, host: str) -> None:
        """Process 0 listens (the kernel takes the calls), the others connect and wait for the line to break."""
        if self.index == 0:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            self._line = socket.create_server(("", 0), family=family, backlog=self.count, dualstack_ipv6=both)
            self._client.key_value_set("steerjax/line", str(self._line.getsockname()[1]))
            return
        port = int(self._client.blocking_key_value_get("steerjax/line", int(GRACE * 1000)))

        def wait(line: socket.socket | None) -> None:
            while line is not None:
                with line, contextlib.suppress(OSError):
                    line.recv(1)  # nothing is ever sent
                line = _call(host, port)  # something on the way may have cut an idle line
            if not self._leaving:
                _say(f"error: process {self.index} of {self.count} ends, because {FIRST_GONE}")
                os._exit(1)

        if line := _call(host, port):  # a firewall may let only the coordinator's port through
            threading.Thread(target=wait, args=(line,), name="steerjax-line", daemon=True).start()

    def _beat(self) -> str | None:
        """Gives a sign of life, then waits up to BEAT seconds for news."""
        sign = f"{time.monotonic()}/{self._moves}/{self._place}"
        self._client.key_value_set(f"steerjax/alive/{self.index}", sign, allow_overwrite=True)
        try:
            return self._client.blocking_key_value_get(NEWS, int(BEAT * 1000))
        except jax.errors.JaxRuntimeError as error:
            if not str(error).startswith("DEADLINE_EXCEEDED"):
                raise
            return None

    def _find_lost(self) -> str | None:
        """What process 0 sees in the signs of life: who has gone silent, or that nobody gets on."""
        signs, now = self._read("steerjax/alive/"), time.monotonic()
        for i, sign in signs.items():
            if self._seen[i][0] != sign:
                self._seen[i] = sign, now
        places = {i: sign.split("/", 1)[1] for i, sign in signs.items()}
        silent = [i for i, (_, since) in self._seen.items() if now - since > LOST]
        if silent:
            names = ", ".join(f"process {i} (last at '{_place(signs.get(i))}')" for i in silent)
            return f"{names} gave no sign of life for {LOST:g} s: killed, out of memory, or its machine is down"
        if places != self._places:
            self._places, self._moved = places, now
        if now - self._moved > self._wait:
            names = ", ".join(f"process {i} is at '{_place(sign)}'" for i, sign in sorted(signs.items()))
            return f"no process got on for {self._wait:g} s: {names}"
        return None

    def _leave(self) -> None:
        """Ends this process without waiting for anything but, in process 0, that the others have heard the news."""
        self._leaving = True
        end = time.monotonic() + GRACE
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"steerjax/left/{self.index}", "", allow_overwrite=True)
            while self.index == 0 and (now := time.monotonic()) < end:
                here = {i for i, (_, since) in self._seen.items() if now - since < LOST} - {0}
                if here <= self._read("steerjax/left/").keys():
                    break
                time.sleep(0.1)
        os._exit(1)


ALONE = Processes()


def _place(sign: str | None) -> str:
    return sign.split("/", 2)[2] if sign else "start"


def _flat(facts: Mapping) -> dict[str, str]:
    """{"a": {"b": 1}} -> {"a.b": "1"}."""
    leaves = jax.tree_util.tree_leaves_with_path(dict(facts), is_leaf=lambda x: x is None)
    return {jax.tree_util.keystr(path, simple=True, separator="."): repr(leaf) for path, leaf in leaves}


def _say(text: str) -> None:
    """Past Python's buffers, whose locks a thread that is stuck may hold."""
    os.write(2, (text + "\n").encode())


def _check_same(name: str, facts: Mapping[int, Mapping[str, str]]) -> None:
    """Raises TrainingError where a process's facts differ from most others' (from process 0's, if it is a draw)."""
    differences = []
    for key in facts[0]:
        values = {i: facts[i].get(key) for i in sorted(facts)}
        usual = Counter(values.values()).most_common(1)[0][0]
        differences += [f"process {i} has {key} = {v}, the others {usual}" for i, v in values.items() if v != usual]
    if differences:
        raise TrainingError(
            f"'{name}': the processes do not do the same. " + "; ".join(differences[:5])
            + "\n  cure: the same command, code and files on every machine"
        )  # fmt: skip


@contextlib.contextmanager
def connect(environment: Mapping[str, str] = os.environ) -> Iterator[Processes]:
    """Joins the run's other processes, if the environment names any; to be entered before jax looks for devices.

    When the block fails in one of several processes, all end, with an error that names it.

    Raises:
        ConfigError: an environment that makes no sense.
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
    seconds, wait = (
        whole_number({name: default} | dict(environment), name, 1)
        for name, default in (("STEERJAX_START_SECONDS", "300"), ("STEERJAX_WAIT_SECONDS", "3600"))
    )
    # The preemption service would take SIGTERM for itself; training/loop.py agrees on it with the step.
    jax.config.update("jax_enable_preemption_service", False)
    # When the wait is over jax aborts without saying what for, so ours ends first.
    timer = threading.Timer(seconds, _explain_start, (arguments, seconds))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(initialization_timeout=seconds + 30, shutdown_timeout_seconds=60, **arguments)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"jax.distributed does not start: {error}\n  cure: see launch/README.md") from error
    finally:
        timer.cancel()
    from jax._src import distributed  # the store has no public name; Orbax reaches it the same way

    state = distributed.global_state
    return Processes(state.process_id, state.num_processes, state.client, state.coordinator_address, wait)


def _explain_start(arguments: dict, seconds: int) -> None:
    address, index, count = (arguments.get(k) for k in ("coordinator_address", "process_id", "num_processes"))
    if address is None:
        text = f"not all processes of the run started within {seconds} s"
    elif index and _call(*address.rsplit(":", 1)) is None:
        text = f"process {index} of {count} did not reach STEERJAX_COORDINATOR {address} within {seconds} s"
    else:
        text = f"process {index} of {count} waited {seconds} s, and not all {count} processes have come"
    _say(
        f"error: {text}\n  cure: look into the others' logs; is process 0 at that address, is the port open, has each "
        "process a number of its own? STEERJAX_START_SECONDS gives more time"
    )
    os._exit(1)


def _call(host: str, port: int | str) -> socket.socket | None:
    """A connection, or None where nobody answers."""
    try:
        line = socket.create_connection((host, int(port)), timeout=5)
    except OSError:
        return None
    line.settimeout(None)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return line
