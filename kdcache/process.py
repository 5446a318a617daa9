"""What a long run owes the machine it is on: it stops when asked to, and says what it took of which machine."""

import os
import platform
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STOP_SECONDS = 20.0
"""After SIGTERM; what has not ended by then is ended. The environment variable KDCACHE_STOP_SECONDS sets another."""


_open: list[threading.Event] = []
"""Events of the contexts that are open, outer ones first: a signal that an inner one gets is meant for all."""


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Give an event that SIGTERM or the first Ctrl-C sets; a second one acts as usual.

    After SIGTERM the program has `STOP_SECONDS` to leave the context; then it is ended where it stands, with the exit
    code of an interrupted run: whoever sent the signal is about to send one that cannot be caught, and what is
    committed survives either.

    A signal that the program was started to ignore (`nohup`, a shell's background job) stays ignored. Outside the main
    thread, where Python delivers no signals, the event is never set.
    """
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}

    def stop(number: int, _frame: Any) -> None:
        for one in _open:
            one.set()
        signal.signal(number, before[signal.Signals(number)] or signal.SIG_DFL)
        if number == signal.SIGTERM and not late.is_alive():
            late.start()

    late = threading.Timer(float(os.environ.get("KDCACHE_STOP_SECONDS", STOP_SECONDS)), _end)
    late.daemon = True
    for number in before:
        signal.signal(number, stop)
    _open.append(stopped)
    try:
        yield stopped
    finally:
        _open.remove(stopped)
        late.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def _end() -> None:
    sys.stderr.write("kdcache: asked to stop, the work at hand did not end in time; it is left to be done again\n")
    sys.stderr.flush()
    os._exit(75)


def peak_memory_bytes() -> int:
    """Return the largest resident size this process has had since its program began."""
    try:
        # Linux: getrusage also counts what the parent process held when it started this one
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def machine() -> dict[str, str | int]:
    """Return what measurements stand beside: processor, cores this process may use, system, Python."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "processor": processor,
        "cores": cores,
        "system": platform.system(),
        "python": platform.python_version(),
    }
