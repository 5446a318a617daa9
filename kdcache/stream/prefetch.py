"""A thread that works ahead and stops when its consumer does."""

import atexit
import queue
import threading
from collections.abc import Generator, Iterator
from contextlib import suppress
from typing import Any, TypeVar

AHEAD = 4
"""Items made ahead."""

T = TypeVar("T")


def prefetched(source: Iterator[T]) -> Iterator[T]:
    """Give the items of an iterator, made ahead by a thread that stops when the consumer does."""
    ready: queue.Queue[Any] = queue.Queue(maxsize=AHEAD)
    stop = threading.Event()
    end = object()

    def put(item: Any) -> bool:
        while not stop.is_set():
            with suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return True
        return False

    def produce() -> None:
        try:
            for item in source:
                if not put(item):
                    return
            put(end)
        except BaseException as error:  # handed to the consumer, which raises it
            put(error)
        finally:
            if isinstance(source, Generator):
                source.close()  # here and now, not when the interpreter takes its modules apart

    thread = threading.Thread(target=produce, name="kdcache-prefetch", daemon=True)

    def halt() -> None:
        stop.set()
        thread.join()

    # a thread that is inside native code while the interpreter goes away aborts the process
    atexit.register(halt)
    unregister = atexit.unregister  # which a generator that is left behind outlives
    thread.start()
    try:
        while (item := ready.get()) is not end:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        halt()
        unregister(halt)
