"""Fill a store whose shards are made one after the other by one function: what editing, conversion and asking share."""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from numpy.typing import NDArray

from kdcache.errors import Interrupted
from kdcache.process import stop_signals
from kdcache.store.encode import SampleTable
from kdcache.store.writer import StoreWriter

Array = NDArray[Any]


def write_shards(
    writer: StoreWriter,
    made: Callable[[int], tuple[dict[str, Array], SampleTable]],
    progress: Callable[[int, int], None] | None = None,
    stopped: threading.Event | None = None,
) -> int:
    """Commit every shard that is not there yet; return the positions of all.

    Args:
        writer: Of the store.
        made: Gives the decoded columns and the samples of a shard.
        progress: Called with positions done and all.
        stopped: Set by whoever catches SIGTERM and Ctrl-C already; without it they are caught here.

    Raises:
        Interrupted: SIGTERM or Ctrl-C; the same call goes on.
    """
    shards = writer.plan.shards
    total = sum(shard.rows for shard in shards)
    done = sum(shards[index].rows for index in writer.committed)
    with stop_signals() if stopped is None else nullcontext(stopped) as event:
        for index in writer.unmade():
            writer.write_shard(index, *made(index))
            done += shards[index].rows
            if progress:
                progress(min(done, total), total)
            if event.is_set():
                raise Interrupted(
                    "The work was stopped; finished shards are kept.",
                    where=str(writer.root),
                    hint="Run the same command again to go on.",
                )
    return total
