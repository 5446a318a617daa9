"""Commands about stores: look into them, check, share, edit and convert them."""

from pathlib import Path
from typing import Annotated

import typer

from kdcache.cli.options import AsJson, Columns, Quiet, Samples, Shards, StorePath, Top, print_result
from kdcache.errors import ConfigError


def info(store: StorePath, as_json: AsJson = False) -> None:
    """Say what a store holds: teacher, data, columns, bytes a position, digest. Reads the manifest only."""
    from kdcache import describe, display

    print_result(describe.summary(store), as_json, display.summary)


def head(
    store: StorePath,
    count: Annotated[int, typer.Option("-n", "--samples", min=1, help="Samples to show.")] = 3,
    positions: Annotated[int, typer.Option(min=1, help="Positions of each sample to show.")] = 8,
    candidates: Annotated[int, typer.Option(min=1, help="Teacher's candidates at each position.")] = 5,
    temperature: Annotated[float, typer.Option(help="Temperature of the shown probabilities.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Show the first samples: decoded tokens, the teacher's top candidates and their probabilities."""
    from kdcache import describe, display

    if not 0 < temperature < float("inf"):
        raise ConfigError(f"A temperature is a positive number, not {temperature}.", where="--temperature")
    rows = describe.first_samples(store, count, positions=positions, candidates=candidates, temperature=temperature)
    print_result(rows, as_json, display.first_samples)


def verify(
    store: StorePath,
    quick: Annotated[bool, typer.Option("--quick", help="Manifest, presence and sizes only.")] = False,
    teacher: Annotated[
        str | None, typer.Option(help="Also compare rows with this live model (folder, hub name, GGUF).")
    ] = None,
    examples: Annotated[
        Path | None, typer.Option(help="Inputs of a classifier's store, for --teacher; default: those of --config.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Positions to compare with the live teacher.")] = 256,
    repair: Annotated[bool, typer.Option("--repair", help="Mend what is damaged, by --mirror or --config.")] = False,
    mirror: Annotated[str | None, typer.Option(help="Folder or URL of a copy that damaged objects come from.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="Config of the capture: its teacher is compared with; with --repair it makes shards again."),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check every digest and row count of a store, and optionally its rows against the live teacher.

    Example: kdcache verify stores/images --config capture.yaml

    Example: kdcache verify stores/wiki --repair --mirror s3://bucket/wiki
    """
    from functools import partial

    from kdcache import display
    from kdcache.verify import verify as run

    if repair and mirror is None and config is None:
        raise ConfigError("There is nothing to repair it with.", where="--repair", hint="Give --mirror or --config.")
    settings = None
    if config is not None:
        from kdcache.capture.config import CaptureConfig
        from kdcache.config import load_config

        settings = load_config(CaptureConfig, config)
    live = teacher or (None if settings is None or repair else settings.teacher)
    inputs = examples or (settings.examples.path if settings is not None and settings.examples is not None else None)
    with display.count_progress("objects", quiet=quiet) as progress:
        looked = partial(run, store, quick=quick, teacher=live, examples=inputs, rows=rows, progress=progress)
        report = looked()
        if repair and report.problems:
            from kdcache.repair import repair as mend

            mend(store, report.problems, mirror=mirror, config=settings)
            report = looked()
    print_result(report.as_dict(), as_json, display.verify_report)
    if report.problems:
        raise typer.Exit(3)


def push(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="Folder of a finished store.")],
    url: Annotated[str, typer.Argument(metavar="URL", help="hf://datasets/OWNER/NAME, s3://, gs://, az:// or file:.")],
    card: Annotated[Path | None, typer.Option("--card", help="A dataset card in place of the one it writes.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Upload a store for others to read: data first, manifest last, with a dataset card and a preview.

    Stopped at any moment, the same command goes on with what is not there yet.

    Example: kdcache push stores/wiki hf://datasets/me/wiki-logits
    """
    from kdcache import display
    from kdcache.share import push as run

    text = None if card is None else card.read_text()
    with display.bytes_progress("push", quiet=quiet) as progress:
        result = run(store, url, progress=progress, card_text=text)
    print_result(result.as_dict(), as_json, display.transfer)


def pull(
    url: Annotated[str, typer.Argument(metavar="URL", help="Of a shared store; #blake3=DIGEST at its end pins it.")],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Folder it goes to.")],
    columns: Columns = None,
    top: Top = None,
    shards: Shards = None,
    samples: Samples = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Bring a shared store, or a part of it, to a folder; every object is verified as it arrives.

    Of a part only the objects that it is made of are fetched. Stopped at any moment, the same command goes on.
    `kdcache train --store URL` needs no pull.

    Example: kdcache pull hf://datasets/me/wiki-logits stores/wiki --shards 0:10 --top 16
    """
    from kdcache import display
    from kdcache.share import pull as run

    if any(one is not None for one in (columns, top, shards, samples)):
        select(url, out, columns, top, shards, samples, as_json, quiet)
        return
    with display.bytes_progress("pull", quiet=quiet) as progress:
        result = run(url, out, progress=progress)
    print_result(result.as_dict(), as_json, display.transfer)


def select(
    store: StorePath,
    out: Annotated[Path, typer.Option("--out", help="Folder of the new store.")],
    columns: Columns = None,
    top: Top = None,
    shards: Shards = None,
    samples: Samples = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a part of a store to a new one: fewer columns, fewer entries of each head, some shards or samples.

    Example: kdcache select stores/wiki --out stores/small --top 16 --samples 0:1000
    """
    from kdcache import display
    from kdcache.edit import select as run

    with display.count_progress("positions", quiet=quiet) as progress:
        names = None if columns is None else [name for name in columns.split(",") if name]
        result = run(store, out, columns=names, top=top, shards=shards, samples=samples, progress=progress)
    print_result(result.as_dict(), as_json, display.edited)


def merge(
    stores: Annotated[list[str], typer.Argument(metavar="STORE...", help="Folders or URLs, in order.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the new store.")],
    skip_duplicates: Annotated[
        bool, typer.Option("--skip-duplicates", help="Of samples with the same id keep the first.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write the samples of several stores of one teacher to one.

    Example: kdcache merge stores/wiki stores/news --out stores/both
    """
    from kdcache import display
    from kdcache.edit import merge as run

    with display.count_progress("positions", quiet=quiet) as progress:
        result = run(stores, out, skip_duplicates=skip_duplicates, progress=progress)
    print_result(result.as_dict(), as_json, display.edited)


def add(
    store: StorePath,
    other: Annotated[str, typer.Argument(metavar="OTHER", help="Folder or URL of the store that has the columns.")],
    columns: Annotated[
        list[str], typer.Option("--columns", metavar="OLD[=NEW]", help="Features to add; may be repeated.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the new store.")],
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a store with features of another, joined by sample id: another layer, or another teacher's.

    Example: kdcache add stores/wiki stores/wiki-layers --columns hidden.12 --out stores/rich
    """
    from kdcache import display
    from kdcache.edit import add as run

    names = {old: new or old for old, _, new in (one.partition("=") for one in columns)}
    with display.count_progress("positions", quiet=quiet) as progress:
        result = run(store, other, out, columns=names, progress=progress)
    print_result(result.as_dict(), as_json, display.edited)


def convert(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Store (with --to), or foreign file or folder (--from).")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the new files, or of the new store.")],
    to: Annotated[str | None, typer.Option("--to", help="Format to write: axolotl, distillkit or parquet.")] = None,
    origin: Annotated[
        str | None, typer.Option("--from", help="Format to read: axolotl, distillkit or parquet.")
    ] = None,
    vocab_size: Annotated[int | None, typer.Option(min=2, help="Length of the teacher's row, when reading.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="The teacher's: folder or hub name, when reading.")] = None,
    top: Top = None,
    pad_id: Annotated[
        int | None, typer.Option(min=0, help="Padding after a sample, whose label does not count.")
    ] = None,
    field: Annotated[str, typer.Option(help="Of the log-probabilities in axolotl's lines.")] = "logprobs",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a store in another tool's format, or make a store of one; what gets lost is said.

    Example: kdcache convert captures/ --from distillkit --out stores/theirs

    Example: kdcache convert stores/wiki --to parquet --out wiki-parquet
    """
    from kdcache import display
    from kdcache.convert import Reading, export
    from kdcache.convert.intake import take_in

    if (to is None) == (origin is None):
        raise ConfigError("Give one of --to and --from.", where="--to, --from")
    with display.count_progress("positions", quiet=quiet) as progress:
        if origin is None:
            result = export(path, out, str(to), progress=progress)
        else:
            reading = Reading(vocab_size=vocab_size, tokenizer=tokenizer, top=top, pad_id=pad_id, field=field)
            result = take_in(path, out, origin, reading, progress=progress)
    print_result(result.as_dict(), as_json, display.converted)
