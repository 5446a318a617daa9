"""Live progress on standard error: a bar, and what there is to say of a rate."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from kdcache.display.tables import capture_plan
from kdcache.display.words import ERR, size


@contextmanager
def capture_progress(*, quiet: bool) -> Iterator[Callable[[Any], None] | None]:
    """Give a callback that shows the plan, then positions/s, bytes written and the time left; None when quiet."""
    if quiet:
        yield None
        return
    with _bar("{task.fields[rate]}", "{task.fields[size]}") as progress:
        task = progress.add_task("capture", total=None, rate="", size="")

        def show(state: Any) -> None:
            if state.stage == "plan":
                capture_plan(state.as_dict(), ERR)
                return
            if state.stage == "samples":
                progress.update(
                    task,
                    completed=state.documents_done,
                    total=state.documents_total,
                    description="documents to samples",
                )
                return
            progress.update(
                task,
                completed=state.positions_done,
                total=state.positions_total,
                description=f"shard {state.shard + 1}/{state.shards}",
                rate=f"{state.positions_per_second:,.0f} positions/s",
                size=size(state.bytes_written),
            )

        yield show


@contextmanager
def count_progress(what: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Give a callback that takes how many are done and all; None when quiet.

    Args:
        what: What is counted.
        quiet: Show nothing.
    """
    if quiet:
        yield None
        return
    with _bar() as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def bytes_progress(what: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Give a callback that takes bytes done and all; None when quiet."""
    if quiet:
        yield None
        return
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=ERR, disable=not ERR.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def train_progress(*, quiet: bool) -> Iterator[Callable[[Any], None] | None]:
    """Give a callback that shows step, loss and tokens/s; None when quiet."""
    if quiet:
        yield None
        return
    with _bar("{task.fields[loss]}", "{task.fields[rate]}") as progress:
        task = progress.add_task("train", total=None, rate="", loss="")

        def show(state: Any) -> None:
            progress.update(
                task,
                completed=state.step,
                total=state.steps,
                description=f"step {state.step}/{state.steps}",
                loss=f"loss {state.loss:.3f}",
                rate=f"{state.tokens_per_second:,.0f} tokens/s",
            )

        yield show


@contextmanager
def sweep_progress(*, quiet: bool) -> Iterator[Callable[[Any], None] | None]:
    """Give a callback that shows trial, step and the lowest metric so far; None when quiet."""
    if quiet:
        yield None
        return
    with _bar("{task.fields[best]}") as progress:
        task = progress.add_task("sweep", total=None, best="")

        def show(state: Any) -> None:
            done = state.trial + state.train.step / state.train.steps
            name = f"trial {state.trial + 1}/{state.trials}, step {state.train.step}/{state.train.steps}"
            best = "" if state.best is None else f"best {state.best:.4f}"
            progress.update(task, completed=done, total=state.trials, description=name, best=best)

        yield show


def _bar(*fields: str) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        *[TextColumn(field) for field in fields],
        TimeRemainingColumn(),
        console=ERR,
        disable=not ERR.is_terminal,
    )
