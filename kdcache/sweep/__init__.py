"""Search a training run's settings over one store: a trial is an ordinary `train`, and none of them needs a teacher.

Trial n is a pure function of the seed and of the trials before it, so a search that was stopped goes on as if it had
not been.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kdcache.errors import ConfigError, CorruptObjectError, Interrupted, MismatchError, TrainingError
from kdcache.fingerprint import canonical_json, digest_json
from kdcache.process import stop_signals
from kdcache.store import Store, open_store
from kdcache.store.disk import storage_errors
from kdcache.store.objects import write_object
from kdcache.sweep.draw import load_optuna, next_point
from kdcache.sweep.result import SweepProgress, SweepResult, Trial
from kdcache.sweep.space import TEMPERATURE, Axis, SweepConfig, default_space, held_at_one, placed, require_fit
from kdcache.tokenizer import load_tokenizer
from kdcache.train import METRICS, TrainConfig, TrainProgress, TrainResult, held_out, train
from kdcache.train.spans import held_out_by_text
from kdcache.train.student import load_student

IDENTITY, TRIALS, POINT = "sweep.json", "trials.jsonl", "point.json"

AT_ONE = "The store's teacher told log-probabilities at T = 1 alone: loss.temperature was held at 1, not searched."


def sweep(
    config: TrainConfig,
    store: Store | Path | str,
    out: Path | str,
    *,
    trials: int = 20,
    space: Mapping[str, Axis] | None = None,
    teacher_seconds_per_position: float | None = None,
    progress: Callable[[SweepProgress], None] | None = None,
) -> SweepResult:
    """Train once for each trial, from one store, and return the point whose student is best on the held-out store.

    Points are drawn by optuna's TPE (Bergstra et al. 2011), seeded with run.seed. Every finished trial is a line of
    `out/trials.jsonl`; the same call goes on where it was stopped, in the middle of a trial too, and comes to what it
    would have come to undisturbed. More trials may be asked for later.

    Args:
        config: The run that is varied; `data.validation` is what students are measured on, `run.metric` how.
        store: What every trial is trained from.
        out: Folder of the search; trial n keeps its student and metrics under `trials/n`.
        trials: How many in all.
        space: Key to axis; default: `default_space()`.
        teacher_seconds_per_position: Of a live teacher, to say what the search would have taken with one; default: the
            capture's, where the store recorded it.
        progress: Called after every step of every trial.

    Raises:
        ConfigError: optuna is not installed, there is no held-out store, or the space does not fit the config.
        MismatchError: The folder holds a search with another config, space or store; or as `train`.
        TrainingError: No trial came to a finite metric.
        Interrupted: SIGTERM or Ctrl-C; the same call goes on.
    """
    load_optuna()
    if config.data.validation is None:
        raise ConfigError(
            "A search needs a held-out store to measure its students on.",
            where="data.validation",
            hint="Capture one, and add --set data.validation=DIR.",
        )
    opened = store if isinstance(store, Store) else open_store(store)
    root = Path(out)
    asked = dict(space) if space is not None else default_space()
    stores = [opened, *(open_store(one.store) for one in config.data.teachers)]
    held = held_at_one(config, asked, stores)
    # in the order of their keys, in which they are drawn
    axes = {key: asked[key] for key in sorted(asked) if key not in held}
    if not axes:
        raise ConfigError("Nothing is left to search.", where=", ".join(held), hint=AT_ONE)
    fixed = placed(config, {TEMPERATURE: 1.0}) if held else config
    require_fit(fixed, axes)
    _claim(root, config, asked, stores)
    done = _finished(root, axes)
    with stop_signals() as stopped:
        while len(done) < trials:
            if stopped.is_set():
                raise Interrupted(
                    f"The search was stopped after {len(done)} of {trials} trials.",
                    where=str(root),
                    hint="Run the same command again to go on.",
                )
            done.append(_trial(fixed, opened, root, axes, done, trials, progress))
            lines = b"".join(canonical_json(asdict(one)) + b"\n" for one in done)
            write_object(root, TRIALS, lines)
            # the student is kept; what would resume its training is three times as large
            shutil.rmtree(_folder(root, len(done) - 1) / "checkpoints", ignore_errors=True)
    return _result(fixed, root, stores, done, bool(held), teacher_seconds_per_position)


def _trial(
    config: TrainConfig,
    store: Store,
    root: Path,
    axes: Mapping[str, Axis],
    before: Sequence[Trial],
    trials: int,
    progress: Callable[[SweepProgress], None] | None,
) -> Trial:
    number = len(before)
    folder = _folder(root, number)
    if not (folder / POINT).is_file():
        # kept beside its checkpoints: another release of optuna might draw another
        write_object(folder, POINT, canonical_json(next_point(axes, config.run.seed, before)))
    point = json.loads((folder / POINT).read_bytes())
    settings = placed(config, point)
    best = min((one.value for one in before if one.value is not None), default=None)

    def show(state: TrainProgress) -> None:
        if progress is not None:
            progress(SweepProgress(number, trials, best, state))

    value, error = None, None
    try:
        result = train(settings, store, folder, progress=show)
        value = _value(settings, folder, result)
        if not math.isfinite(value):
            value, error = None, f"{settings.run.metric} is not finite"
    except TrainingError as failure:
        error = failure.what
    steps = [line for line in _metrics(folder) if "tokens" in line]
    return Trial(
        number=number,
        point=point,
        value=value,
        error=error,
        steps=len(steps),
        positions=sum(line["tokens"] for line in steps),
        teacher_positions=sum(line["tokens"] for line in steps if line["alpha"] > 0),
        seconds=round(sum(line["step_seconds"] for line in steps), 3),
    )


def _value(config: TrainConfig, folder: Path, result: TrainResult) -> float:
    """Return the metric of the student that was saved, which the last validation may have come before."""
    name = config.run.metric
    found = {line["step"]: line["validation"][name] for line in _metrics(folder) if "validation" in line}
    if result.stopped_early:
        return float(min(found.values()))
    if result.steps in found:
        return float(found[result.steps])
    held = open_store(str(config.data.validation))
    device = "cuda" if torch.cuda.is_available() and config.run.device != "cpu" else "cpu"
    task = None if held.manifest.kind == "causal_lm" else config.student.task or "sequence-classification"
    speaks = None if config.student.tokenizer is None else load_tokenizer(str(folder))
    outputs = held.vocab_size if speaks is None else len(speaks)
    student = load_student(folder, config.student.factory, outputs, task).to(device)
    whole = partial(held_out, data=config.data)
    measure = whole if speaks is None else partial(held_out_by_text, tokenizer=speaks)
    measured = measure(student, held, batch_size=config.data.batch_size, device=device)
    return float(getattr(measured, name))


def _claim(root: Path, config: TrainConfig, space: Mapping[str, Axis], stores: Sequence[Store]) -> None:
    identity = {
        "config": digest_json(config.model_dump(mode="json")),
        "space": digest_json({key: axis.model_dump(mode="json") for key, axis in space.items()}),
        "store": stores[0].digest,
        "teachers": [one.digest for one in stores[1:]],
        "held-out store": open_store(str(config.data.validation)).digest,
    }
    try:
        recorded = json.loads((root / IDENTITY).read_bytes())
    except FileNotFoundError:
        with storage_errors(root):
            if root.exists() and (not root.is_dir() or any(root.iterdir())):
                raise MismatchError(
                    "This is not an empty folder, and it holds no search.",
                    where=str(root),
                    hint="Choose another --out.",
                ) from None
        write_object(root, IDENTITY, canonical_json(identity))
        return
    if wrong := [name for name, value in identity.items() if recorded.get(name) != value]:
        raise MismatchError(
            f"The folder holds another search: {', '.join(wrong)} differ.",
            where=str(root),
            hint="Choose another --out, or go back to what the search began with.",
        )


def _finished(root: Path, axes: Mapping[str, Axis]) -> list[Trial]:
    path = root / TRIALS
    if not path.is_file():
        return []
    try:
        found = [Trial(**json.loads(line)) for line in path.read_text().splitlines()]
        whole = [one.number for one in found] == list(range(len(found)))
        whole = whole and all(one.point.keys() == axes.keys() for one in found)
    except (ValueError, TypeError, AttributeError) as error:
        raise CorruptObjectError(f"The list of trials is damaged: {error}.", where=str(path)) from error
    if not whole:
        raise CorruptObjectError("The list of trials is not that of this search.", where=str(path))
    return found


def _result(
    config: TrainConfig, root: Path, stores: Sequence[Store], done: list[Trial], held: bool, given: float | None
) -> SweepResult:
    ended = [one for one in done if one.value is not None]
    if not ended:
        raise TrainingError("No trial came to a finite metric.", where=str(root), hint="Lower the learning rates.")
    best = min(ended, key=lambda one: (one.value, one.number))
    rates = [_throughput(one) for one in stores]
    basis = "not recorded in the store: give --teacher-seconds-per-position"
    if given is not None:
        basis = "given"
    elif all(rates):
        given = sum(1 / one for one in rates)
        basis = "the capture's throughput on its machine, targets measured, from the store"
    seconds = sum(one.seconds for one in done)
    live = None if given is None else seconds + given * sum(one.teacher_positions for one in done)
    point = {**best.point, **({TEMPERATURE: 1.0} if held else {})}
    return SweepResult(
        metric=config.run.metric,
        best=best,
        overrides=[f"{key}={json.dumps(value)}" for key, value in point.items()],
        student=str(_folder(root, best.number)),
        trials=done,
        seconds=round(seconds, 3),
        positions=sum(one.positions for one in done),
        teacher_seconds_per_position=given,
        teacher_basis=basis,
        live_seconds=None if live is None else round(live, 3),
        notes=[AT_ONE] if held else [],
        store_digest=stores[0].digest,
    )


def _throughput(store: Store) -> float:
    """Return the positions a second of a store's capture; 0 where it does not say."""
    recorded = (store.manifest.part("provenance") or {}).get("positions_per_second")
    return float(recorded) if isinstance(recorded, int | float) else 0.0


def _metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / METRICS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _folder(root: Path, number: int) -> Path:
    return root / "trials" / f"{number:03d}"


__all__ = [
    "Axis",
    "SweepConfig",
    "SweepProgress",
    "SweepResult",
    "Trial",
    "default_space",
    "placed",
    "sweep",
]
