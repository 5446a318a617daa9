"""Stopping when asked to, and memory as the system counts it."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from kdcache.process import machine, peak_memory_bytes, stop_signals


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as in a terminal: what runs the tests may have started them with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_signals() as stopped:
            signal.raise_signal(signal.SIGINT)
            assert not stopped.is_set()
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            signal.raise_signal(signal.SIGTERM)
            assert stopped.is_set()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_the_first_signal_asks_and_the_second_acts_as_usual() -> None:
    with stop_signals() as stopped:
        assert not stopped.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped.wait(1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_inside_is_heard_outside() -> None:
    with stop_signals() as outer:
        with stop_signals() as inner:
            signal.raise_signal(signal.SIGTERM)
            assert inner.is_set()
        assert outer.is_set()
    with stop_signals() as later:
        assert not later.is_set()


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with stop_signals():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_what_does_not_end_in_time_is_ended() -> None:
    code = (
        "import os, signal, time\nfrom kdcache.process import stop_signals\nwith stop_signals() as stopped:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    stopped.wait()\n    time.sleep({})\nprint('done')"
    )
    environment = {**os.environ, "KDCACHE_STOP_SECONDS": "1"}
    for seconds, status in ((30, 75), (0, 0)):
        line = [sys.executable, "-c", code.format(seconds)]
        done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=25)
        assert done.returncode == status
        assert ("did not end in time" in done.stderr, "done" in done.stdout) == (status == 75, status == 0)


def test_other_threads_leave_signals_alone() -> None:
    seen = []

    def work() -> None:
        with stop_signals() as stopped:
            seen.append((stopped.is_set(), signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def test_peak_memory_grows_with_what_was_touched() -> None:
    before = peak_memory_bytes()
    block = bytearray(before + (64 << 20))
    block[:: 1 << 12] = b"x" * len(range(0, len(block), 1 << 12))
    assert peak_memory_bytes() > before + (32 << 20)


def test_a_process_does_not_count_what_its_parent_held() -> None:
    block = bytearray(400 << 20)
    block[:: 1 << 12] = b"x" * len(range(0, len(block), 1 << 12))
    line = "from kdcache.process import peak_memory_bytes; print(peak_memory_bytes())"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200 << 20 < len(block)


def test_the_machine_has_a_name_and_cores() -> None:
    found = machine()
    assert found["processor"]
    assert 1 <= int(found["cores"]) <= (os.cpu_count() or 1)
