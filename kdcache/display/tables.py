"""Results as tables on standard output; every function takes the JSON-ready value that `--json` prints."""

from rich.console import Console
from rich.table import Table

from kdcache.display.words import OUT, Result, brief, size, text


def summary(info: Result) -> None:
    """Show what `kdcache info` found."""
    table = _facts()
    for key in ("path", "format_version", "complete", "kind", "samples", "positions", "k", "vocab_size"):
        if info.get(key) is not None:
            table.add_row(key, text(info[key]))
    if not info["complete"]:
        table.add_row("shards", f"{info['shards_committed']} of {info['shards']} committed")
        table.add_row("next", text(info["next"]))
        OUT.print(table)
        return
    table.add_row("bytes", f"{size(info['bytes'])}, {info['bytes_per_position']:.1f} a position")
    for part in ("teacher", "tokenizer", "source", "licences"):
        table.add_row(part, text(brief(info[part])))
    if info["skipped"]:
        table.add_row("skipped", text(brief(info["skipped"])))
    table.add_row("digest", info["digest"])
    OUT.print(table)
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
    OUT.print(columns)


def transfer(result: Result) -> None:
    """Show what a push or a pull did."""
    table = _facts()
    table.add_row("objects", f"{result['objects']:,}, {size(result['bytes'])}")
    table.add_row("moved now", f"{result['moved_objects']:,}, {size(result['moved_bytes'])}")
    table.add_row("open it as", text(result["pin"]))
    OUT.print(table)


def converted(result: Result) -> None:
    """Show what `convert` has written, and what did not come along."""
    table = _facts()
    for name in ("samples", "positions", "files"):
        table.add_row(name, f"{result[name]:,}")
    table.add_row("store", text(result["digest"][:16]))
    for reason, count in result["counts"].items():
        table.add_row(text(reason), f"{count:,} positions")
    OUT.print(table)
    for sentence in result["lost"]:
        OUT.print(f"Lost: {text(sentence)}", style="yellow")


def edited(result: Result) -> None:
    """Show what an edit has written."""
    table = _facts()
    for name in ("samples", "positions"):
        table.add_row(name, f"{result[name]:,}")
    table.add_row("bytes", f"{size(result['bytes'])}, {result['bytes'] / result['positions']:.1f} a position")
    table.add_row("digest", result["digest"])
    OUT.print(table)


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
        OUT.print(table)


def verify_report(report: Result) -> None:
    """Show what `kdcache verify` found."""
    OUT.print(f"checked {report['objects']} objects, {size(report['bytes'])}")
    if report.get("rows_compared"):
        OUT.print(
            f"compared {report['rows_compared']} positions with the live teacher: "
            f"same first candidate {report['top1_agreement']:.4f}, "
            f"largest logit difference {report['max_logit_difference']:.4f}"
        )
    for problem in report["problems"]:
        OUT.print(f"[red]damaged[/red] {text(problem['path'])}: {text(problem['what'])}")
    OUT.print("no problem found" if not report["problems"] else f"{len(report['problems'])} problems")


def capture_plan(plan: Result, console: Console = OUT) -> None:
    """Show what a capture keeps, and what each column takes before it is compressed."""
    extent = f"{plan['samples']:,} samples, {plan['rows']:,} rows, k = {plan['k']} of {plan['vocab_size']}"
    table = Table(title=f"{extent}; shards: {plan['shards']:,}; before compression:", title_justify="left")
    for name in ("column", "codec", "shape", "bytes", "in each", "in all"):
        table.add_column(name, justify="right" if name in ("bytes", "in all") else "left", overflow="fold")
    for one in plan["columns"]:
        shape = "".join(f"[{n}]" for n in one["shape"])
        cells = (one["name"], one["codec"], shape, f"{one['entry_bytes']:,}", one["per"], size(one["bytes"]))
        table.add_row(*map(text, cells))
    table.add_row("in all", "", "", "", "", size(plan["bytes"]), style="bold")
    console.print(table)
    for note in plan["notes"]:
        console.print(text(note), style="yellow")


def capture_result(result: Result) -> None:
    """Show how a capture ended."""
    if result["already_complete"]:
        OUT.print("The store is complete already; nothing to do.")
    OUT.print(
        f"{result['samples']:,} samples, {result['positions']:,} positions, {size(result['bytes'])} "
        f"({result['bytes_per_position']:.1f} bytes a position, k = {result['k']})"
    )
    if result.get("skipped"):
        OUT.print(f"skipped: {text(brief(result['skipped']))}")
    OUT.print(f"digest {result['digest']}")


def train_result(result: Result) -> None:
    """Show how a training run ended."""
    OUT.print(table_of(result))


def metrics(result: Result) -> None:
    """Show what `kdcache eval` measured."""
    scores = result.get("scores") or {}
    OUT.print(table_of({**{name: one for name, one in result.items() if name != "scores"}, **scores}))


def comparison(result: Result) -> None:
    """Show the table of `kdcache demo`."""
    table = Table(title=text(result["title"]), title_justify="left")
    for index, name in enumerate(result["columns"]):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in result["rows"]:
        table.add_row(*[text(cell) for cell in row])
    OUT.print(table)
    for line in result["notes"]:
        OUT.print(text(line))


def chain_result(result: Result) -> None:
    """Show what each step of `kdcache chain` gave."""
    table = Table("step", "", "what it gave", title_justify="left")
    for step in result["steps"]:
        own = {**step["result"], **(step["result"].get("validation") or {})}
        shown = ("digest", "samples", "loss", "accuracy", "cross_entropy", "kl", "top1_agreement")
        cells = [f"{own[key]:.4g}" if isinstance(own[key], float) else brief(own[key]) for key in shown if key in own]
        names = [key.replace("_", " ") for key in shown if key in own]
        table.add_row(*map(text, (step["name"], step["kind"], ", ".join(map(" ".join, zip(names, cells))))))
    OUT.print(table)


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
    OUT.print(table)
    OUT.print(text(f"best: {' '.join(f'--set {one}' for one in result['overrides'])}, in {result['student']}"))
    live = result["live_seconds"]
    beside = "unknown" if live is None else f"about {live:,.0f} s, {live / max(1e-9, result['seconds']):.1f} times that"
    OUT.print(f"training took {result['seconds']:,.0f} s for {result['positions']:,} positions, no teacher in memory")
    OUT.print(f"with a live teacher in every step: {beside} (teacher's speed: {text(result['teacher_basis'])})")
    for note in result["notes"]:
        OUT.print(text(note), style="yellow")


def export_result(result: Result) -> None:
    """Show what an export has written, beside what it was before."""
    if result["already_complete"]:
        OUT.print("The export is complete already; nothing to do.")
    table = Table(title=text(f"{result['format']}, by {result['made_by']}"), title_justify="left")
    for name in ("", "before", "after"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("model files", size(result["student_bytes"]), size(result["model_bytes"]))
    for speed in result["speeds"]:
        sides = (speed["before"], speed["after"])
        cells = [f"{one['median_ms']:,.2f} ms ({one['low_ms']:,.2f} to {one['high_ms']:,.2f})" for one in sides]
        table.add_row(text(f"{' x '.join(map(str, speed['shape']))} {speed['input']}"), *cells)
    before, after = result["quality_before"], result["quality_after"]
    if before is not None:
        for name, value in before["scores"].items():
            table.add_row(name, f"{value:.4f}", f"{after['scores'][name]:.4f}")
        table.add_row("positions", f"{before['positions']:,}", f"{after['positions']:,}")
    OUT.print(table)
    parity = result["parity"]
    OUT.print(
        f"largest difference from torch: {parity['largest_difference']:.2g} on logits of up to "
        f"{parity['largest_logit']:.3g}; CPU, {result['threads']} threads, float32 before"
    )
    for note in result["notes"]:
        OUT.print(text(note), style="yellow")


def table_of(result: Result) -> Table:
    """Return a two-column table of a flat result."""
    table = _facts()
    for key, value in result.items():
        if value is not None:
            table.add_row(text(key), text(f"{value:,.4g}" if isinstance(value, float) else brief(value)))
    return table


def _facts() -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table
