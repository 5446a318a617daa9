"""What a person sees in the terminal: tables of results and live progress, in rich.

Every function takes the JSON-ready value that `--json` prints, so that both forms say the same.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

Result = dict[str, Any]

_out = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
_err = Console(stderr=True, highlight=False)


def summary(info: Result) -> None:
    """Show what `kdcache info` found."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key in ("path", "format_version", "complete", "kind", "samples", "positions", "k", "vocab_size"):
        if info.get(key) is not None:
            table.add_row(key, text(info[key]))
    if not info["complete"]:
        table.add_row("shards", f"{info['shards_committed']} of {info['shards']} committed")
        table.add_row("next", text(info["next"]))
        _out.print(table)
        return
    table.add_row("bytes", f"{size(info['bytes'])}, {info['bytes_per_position']:.1f} a position")
    for part in ("teacher", "tokenizer", "source", "licences"):
        table.add_row(part, text(brief(info[part])))
    if info["skipped"]:
        table.add_row("skipped", text(brief(info["skipped"])))
    table.add_row("digest", info["digest"])
    _out.print(table)
    columns = Table(title="columns", title_justify="left")
    for name in ("column", "codec", "type", "bytes a position", "unit"):
        columns.add_column(name, justify="right" if "bytes" in name else "left")
    for column in info["columns"]:
        shape = "".join(f"[{n}]" for n in column["shape"])
        columns.add_row(
            text(column["name"]),
            text(column["codec"]),
            text(column["dtype"] + shape),
            f"{column['bytes_per_position']:.2f}",
            text(column["unit"]),
        )
    _out.print(columns)


def transfer(result: Result) -> None:
    """Show what a push or a pull did."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("objects", f"{result['objects']:,}, {size(result['bytes'])}")
    table.add_row("moved now", f"{result['moved_objects']:,}, {size(result['moved_bytes'])}")
    table.add_row("open it as", text(result["pin"]))
    _out.print(table)


def converted(result: Result) -> None:
    """Show what `convert` has written, and what did not come along."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    for name in ("samples", "positions", "files"):
        table.add_row(name, f"{result[name]:,}")
    table.add_row("store", escape(result["digest"][:16]))
    for reason, count in result["counts"].items():
        table.add_row(escape(reason), f"{count:,} positions")
    _out.print(table)
    for sentence in result["lost"]:
        _out.print(f"Lost: {escape(sentence)}", style="yellow")


def edited(result: Result) -> None:
    """Show what an edit has written."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    for name in ("samples", "positions"):
        table.add_row(name, f"{result[name]:,}")
    table.add_row("bytes", f"{size(result['bytes'])}, {result['bytes'] / result['positions']:.1f} a position")
    table.add_row("digest", result["digest"])
    _out.print(table)


def first_samples(samples: list[Result]) -> None:
    """Show the first samples of a store, one table each."""
    for sample in samples:
        title = f"{sample['id']}: {sample['tokens']} tokens, T = {sample['temperature']:g}"
        table = Table(title=text(title), title_justify="left")
        for name in ("row", "input", "label", "p(label)", "tail", "teacher's candidates"):
            table.add_column(name, overflow="fold")
        for row in sample["rows"]:
            candidates = "  ".join(f"{c['token']!r} {c['probability']:.3f}" for c in row["candidates"])
            mark = "" if row["counts"] else " (masked)"
            table.add_row(
                str(row["row"]),
                text(repr(row["input"])),
                text(repr(row["label"]) + mark),
                "?" if row["label_probability"] is None else f"{row['label_probability']:.3f}",
                f"{row['tail_mass']:.3f}",
                text(candidates),
            )
        _out.print(table)


def verify_report(report: Result) -> None:
    """Show what `kdcache verify` found."""
    _out.print(f"checked {report['objects']} objects, {size(report['bytes'])}")
    if report.get("rows_compared"):
        _out.print(
            f"compared {report['rows_compared']} positions with the live teacher: "
            f"same first candidate {report['top1_agreement']:.4f}, "
            f"largest logit difference {report['max_logit_difference']:.4f}"
        )
    for problem in report["problems"]:
        _out.print(f"[red]damaged[/red] {text(problem['path'])}: {text(problem['what'])}")
    _out.print("no problem found" if not report["problems"] else f"{len(report['problems'])} problems")


def capture_result(result: Result) -> None:
    """Show how a capture ended."""
    if result["already_complete"]:
        _out.print("The store is complete already; nothing to do.")
    _out.print(
        f"{result['samples']:,} samples, {result['positions']:,} positions, {size(result['bytes'])} "
        f"({result['bytes_per_position']:.1f} bytes a position, k = {result['k']})"
    )
    if result.get("skipped"):
        _out.print(f"skipped: {text(brief(result['skipped']))}")
    _out.print(f"digest {result['digest']}")


def train_result(result: Result) -> None:
    """Show how a training run ended."""
    _out.print(table_of(result))


def metrics(result: Result) -> None:
    """Show what `kdcache eval` measured."""
    scores = result.get("scores") or {}
    _out.print(table_of({**{name: one for name, one in result.items() if name != "scores"}, **scores}))


def comparison(result: Result) -> None:
    """Show the table of `kdcache demo`."""
    table = Table(title=text(result["title"]), title_justify="left")
    for index, name in enumerate(result["columns"]):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in result["rows"]:
        table.add_row(*[text(cell) for cell in row])
    _out.print(table)
    for line in result["notes"]:
        _out.print(text(line))


def chain_result(result: Result) -> None:
    """Show what each step of `kdcache chain` gave."""
    table = Table("step", "", "what it gave", title_justify="left")
    for step in result["steps"]:
        own = {**step["result"], **(step["result"].get("validation") or {})}
        shown = ("digest", "samples", "loss", "accuracy", "cross_entropy", "kl", "top1_agreement")
        cells = [f"{own[key]:.4g}" if isinstance(own[key], float) else brief(own[key]) for key in shown if key in own]
        names = [key.replace("_", " ") for key in shown if key in own]
        table.add_row(*map(text, (step["name"], step["kind"], ", ".join(map(" ".join, zip(names, cells))))))
    _out.print(table)


def sweep_result(result: Result) -> None:
    """Show the trials of `kdcache sweep`, the best marked, and what they took."""
    best = result["best"]
    table = Table(title=text(f"held-out {result['metric']}, nats a position"), title_justify="left")
    for name in ("trial", *best["point"], result["metric"], "seconds"):
        table.add_column(text(name), justify="right")
    for trial in result["trials"]:
        cells = [f"{value:.4g}" if isinstance(value, float) else brief(value) for value in trial["point"].values()]
        value = text(trial["error"]) if trial["value"] is None else f"{trial['value']:.4f}"
        style = "bold green" if trial["number"] == best["number"] else None
        table.add_row(str(trial["number"]), *map(text, cells), value, f"{trial['seconds']:,.1f}", style=style)
    _out.print(table)
    _out.print(text(f"best: {' '.join(f'--set {one}' for one in result['overrides'])}, in {result['student']}"))
    live = result["live_seconds"]
    beside = "unknown" if live is None else f"about {live:,.0f} s, {live / max(1e-9, result['seconds']):.1f} times that"
    _out.print(f"training took {result['seconds']:,.0f} s for {result['positions']:,} positions, no teacher in memory")
    _out.print(f"with a live teacher in every step: {beside} (teacher's speed: {text(result['teacher_basis'])})")
    for note in result["notes"]:
        _out.print(text(note), style="yellow")


def export_result(result: Result) -> None:
    """Show what an export has written, beside what it was before."""
    if result["already_complete"]:
        _out.print("The export is complete already; nothing to do.")
    table = Table(title=text(f"{result['format']}, by {result['made_by']}"), title_justify="left")
    for name in ("", "before", "after"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("model files", size(result["student_bytes"]), size(result["model_bytes"]))
    for speed in result["speeds"]:
        sides = (speed["before"], speed["after"])
        cells = [f"{one['median_ms']:,.2f} ms ({one['low_ms']:,.2f} to {one['high_ms']:,.2f})" for one in sides]
        table.add_row(f"{speed['samples']} x {speed['tokens']} tokens", *cells)
    before, after = result["quality_before"], result["quality_after"]
    if before is not None:
        for name in ("cross_entropy", "perplexity", "top1_agreement"):
            table.add_row(name, f"{before[name]:.4f}", f"{after[name]:.4f}")
    _out.print(table)
    parity = result["parity"]
    _out.print(
        f"largest difference from torch: {parity['largest_difference']:.2g} on logits of up to "
        f"{parity['largest_logit']:.3g}; CPU, {result['threads']} threads, float32 before"
    )
    for note in result["notes"]:
        _out.print(text(note), style="yellow")


@contextmanager
def capture_progress(*, quiet: bool) -> Iterator[Callable[[Any], None] | None]:
    """Give a callback that shows positions/s, bytes written and the time left; None when quiet."""
    if quiet:
        yield None
        return
    with _bar("{task.fields[rate]}", "{task.fields[size]}") as progress:
        task = progress.add_task("capture", total=None, rate="", size="")

        def show(state: Any) -> None:
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
    with Progress(*columns, TimeRemainingColumn(), console=_err, disable=not _err.is_terminal) as progress:
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


def say(line: str) -> None:
    """Print one line of progress to standard error."""
    _err.print(text(line))


def table_of(result: Result) -> Table:
    """Return a two-column table of a flat result."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in result.items():
        if value is not None:
            table.add_row(text(key), text(f"{value:,.4g}" if isinstance(value, float) else brief(value)))
    return table


def brief(value: Any) -> str:
    """Return a value on one line: mappings as `key value` pairs, digests shortened."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {brief(inner)}" for key, inner in value.items() if inner is not None)
    if isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef"):
        return value[:12]
    return str(value)


def text(value: Any) -> str:
    """Return text safe to print: markup escaped, control characters made visible.

    Stores come from strangers; a sample's id must not be able to drive the terminal.
    """
    shown = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in str(value))
    return escape(shown)


def size(count: float) -> str:
    """Return a number of bytes with a unit of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError(count)


def _bar(*fields: str) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        *[TextColumn(field) for field in fields],
        TimeRemainingColumn(),
        console=_err,
        disable=not _err.is_terminal,
    )
