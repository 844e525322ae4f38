"""Ctrl-C and SIGTERM on small programs: what ends at once, what is asked for, what a lost reader costs."""

import signal
import subprocess
import sys
import time

import pytest

from tests.interrupts import with_ctrl_c

pytestmark = pytest.mark.short
BUSY = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 60_000_000)"  # a minute in which no handler is called


def start(program: str, *, ignored: bool = False, **options) -> subprocess.Popen:
    """Once it has printed a line. `ignored`: Ctrl-C, when it starts."""
    command = with_ctrl_c([sys.executable, "-u", "-c", program], ignored=ignored)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


def end(process: subprocess.Popen, *sent: signal.Signals, seconds: float = 20) -> tuple[int, str, str]:
    """The exit status and the rest of what it says after these signals."""
    try:
        for number in sent:
            process.send_signal(number)
            time.sleep(0.3)
        out, error = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, out, error


def test_ctrl_c_ends_at_once_and_without_a_traceback():
    program = f"from steerjax.signals import ends_at_once\nwith ends_at_once():\n    print('ready'); {BUSY}"
    assert end(start(program), signal.SIGINT) == (-signal.SIGINT, "", "")


def test_an_ignored_ctrl_c_stays_ignored():
    program = (
        "import time\nfrom steerjax.signals import ends_at_once, stop_on_signals\n"
        "with ends_at_once(), stop_on_signals() as asked:\n    print('ready'); time.sleep(1); print(asked.is_set())"
    )
    assert end(start(program, ignored=True), signal.SIGINT, signal.SIGINT) == (0, "False\n", "")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_what_is_half_written_is_removed_before_a_signal_ends_the_process(tmp_path, sent):
    program = (
        "import time, pathlib\nfrom steerjax.signals import ends_at_once\nfrom steerjax.hf.export import new_folder\n"
        f"with ends_at_once(), new_folder(pathlib.Path({str(tmp_path / 'model')!r})) as folder:\n"
        "    (folder / 'config.json').write_text('{}'); print('ready'); time.sleep(60)"
    )
    assert end(start(program), sent) == (-sent, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks(sent):
    program = (
        "from steerjax.signals import ends_at_once, stop_on_signals\n"
        "with ends_at_once(), stop_on_signals() as asked:\n    print('ready'); asked.wait(); print('saved')"
    )
    assert end(start(program), sent) == (0, "saved\n", "")


@pytest.mark.parametrize("block", ["stop_on_signals", "raises_interrupt"])
@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ((signal.SIGINT, signal.SIGINT), 130),
        ((signal.SIGTERM, signal.SIGINT), 130),
        ((signal.SIGINT, signal.SIGTERM), 143),
    ],
)
def test_a_second_signal_leaves_at_once(block, sent, status):
    """Though Python never comes back to call a handler."""
    program = (
        f"from steerjax.signals import ends_at_once, {block}\n"
        f"with ends_at_once(), {block}():\n    print('ready'); {BUSY}"
    )
    process = start(program)
    time.sleep(0.5)  # until it is busy
    assert end(process, *sent) == (status, "", "")


def test_sigterm_sent_to_a_process_and_to_its_group_is_one():
    """As `timeout` does it."""
    program = (
        "import time\nfrom steerjax.signals import ends_at_once, stop_on_signals\n"
        "with ends_at_once(), stop_on_signals() as asked:\n"
        "    print('ready'); asked.wait(); time.sleep(1); print('saved')"
    )
    assert end(start(program), signal.SIGTERM, signal.SIGTERM) == (0, "saved\n", "")


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_can_go_on_says_so(sent, status):
    program = (
        "import time\nfrom steerjax.command import resumable_command\nfrom steerjax.signals import ends_at_once\n"
        "with ends_at_once(), resumable_command():\n    print('ready'); time.sleep(60)"
    )
    found, out, error = end(start(program), sent)
    assert (found, out) == (status, "")
    assert "the same command goes on" in error
    assert "Traceback" not in error


def test_within_a_program_of_ones_own_the_second_is_its_interrupt():
    """As `steerjax.fit` in a notebook, whose process must not end."""
    program = (
        "import time\nfrom steerjax.signals import stop_on_signals\ntry:\n    with stop_on_signals() as asked:\n"
        "        print('ready')\n        while True: time.sleep(0.1)\n"
        "except KeyboardInterrupt:\n    print(asked.is_set())"
    )
    assert end(start(program), signal.SIGINT, signal.SIGINT) == (0, "True\n", "")


def test_a_reader_that_is_gone_costs_only_what_it_would_have_read(tmp_path):
    program = (
        "import sys, pathlib\nfrom steerjax.signals import outlive_readers\noutlive_readers()\nprint('ready')\n"
        "sys.stdin.read()\nfor _ in range(3): print('step', flush=True)\n"
        f"pathlib.Path({str(tmp_path / 'saved')!r}).write_text('all'); print('done')"
    )
    process = start(program, stdin=subprocess.PIPE)
    process.stdout.close()
    process.stdin.close()
    assert process.wait(timeout=20) == 0
    assert process.stderr.read() == ""
    assert (tmp_path / "saved").read_text() == "all"
