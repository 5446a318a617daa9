"""A thread that works ahead and stops when its consumer does."""

import atexit
import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

AHEAD = 2
"""Items made ahead."""

T = TypeVar("T")


def prefetched(source: Iterator[T]) -> Iterator[T]:
    """Give the items of an iterator, made ahead by a thread that stops when the consumer does."""
    # two queues of the interpreter's own kind: the bounded one takes ten times as long to hand over an item
    ready, room = queue.SimpleQueue[Any](), queue.SimpleQueue[None]()
    stop = threading.Event()
    end = object()
    for _ in range(AHEAD):
        room.put(None)

    def produce() -> None:
        try:
            for item in source:
                room.get()
                if stop.is_set():
                    return
                ready.put(item)
            ready.put(end)
        except BaseException as error:  # handed to the consumer, which raises it
            ready.put(error)
        finally:
            if isinstance(source, Generator):
                source.close()  # here and now, not when the interpreter takes its modules apart

    thread = threading.Thread(target=produce, name="kdcache-prefetch", daemon=True)

    def halt() -> None:
        stop.set()
        room.put(None)
        thread.join()

    # a thread that is inside native code while the interpreter goes away aborts the process
    atexit.register(halt)
    unregister = atexit.unregister  # which a generator that is left behind outlives
    thread.start()
    try:
        while (item := ready.get()) is not end:
            if isinstance(item, BaseException):
                raise item
            room.put(None)
            yield item
    finally:
        halt()
        unregister(halt)
