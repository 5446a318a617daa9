"""Captures, trainings and measurements one after the other, from one YAML file: a student may be the next teacher.

Each step works in `OUT/NAME` and is what its own command is: finished it does nothing, stopped it goes on. So the same
call on a chain that was stopped anywhere goes on there, with the same numbers.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdcache import display
from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.chain.config import ChainConfig, EvalConfig
from kdcache.chain.layout import Planned, plan
from kdcache.errors import Interrupted
from kdcache.evaluate import evaluate
from kdcache.process import stop_signals
from kdcache.store import open_store
from kdcache.store.objects import write_object
from kdcache.train import RESULT, train
from kdcache.train.config import TrainConfig

CHAIN = "chain.json"
"""In the chain's folder: the results so far, written after each step."""

METRICS = "eval.json"
"""In the folder of a measurement: what it found, and of what."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave.

    Attributes:
        name: Of the step, and of its folder.
        kind: capture, train or eval.
        seconds: That this call took for it.
        result: As the step's own command prints it with `--json`.
    """

    name: str
    kind: str
    seconds: float
    result: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ChainResult:
    """What a chain gave, step by step."""

    steps: tuple[StepResult, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return asdict(self)

    def __getitem__(self, name: str) -> dict[str, Any]:
        return next(one.result for one in self.steps if one.name == name)


def run_chain(config: ChainConfig, out: Path | str, *, quiet: bool = False) -> ChainResult:
    """Run the steps of a chain that are not finished and return what all gave; also written to `OUT/chain.json`.

    Args:
        config: The chain; all of it is checked before the first step.
        out: Folder of the steps' folders.
        quiet: Show no progress.

    Raises:
        ConfigError: As `kdcache.chain.layout.plan`.
        Interrupted: SIGTERM or Ctrl-C; the same call goes on.
        Others as `kdcache.capture.capture`, `kdcache.train.train` and `kdcache.evaluate.evaluate`.
    """
    root = Path(out)
    steps = plan(config, root)
    done: list[StepResult] = []
    with stop_signals() as stopped:

        def go_on(*_: Any) -> None:
            # captures and trainings look for signals themselves; this is for between them, and for measuring
            if stopped.is_set():
                raise Interrupted(
                    f"The chain was stopped after {len(done)} of {len(steps)} steps.",
                    where=str(root),
                    hint="Run the same command again to go on.",
                )

        for step in steps:
            go_on()
            if not quiet:
                display.say(f"== {step.kind} {step.name}")
            began = time.perf_counter()
            result = _ran(step, go_on, quiet=quiet)
            done.append(StepResult(step.name, step.kind, round(time.perf_counter() - began, 2), result))
            write_object(root, CHAIN, json.dumps(ChainResult(tuple(done)).as_dict(), indent=2).encode() + b"\n")
    return ChainResult(tuple(done))


def _ran(step: Planned, go_on: Any, *, quiet: bool) -> dict[str, Any]:
    if isinstance(step.config, CaptureConfig):
        with display.capture_progress(quiet=quiet) as captured:
            return capture(step.config, step.folder, progress=captured).as_dict()
    if isinstance(step.config, TrainConfig):
        with display.train_progress(quiet=quiet) as trained:
            return train(step.config, step.store, step.folder, progress=trained).as_dict()
    return _measured(step.config, step.folder, go_on)


def _measured(config: EvalConfig, folder: Path, go_on: Any) -> dict[str, Any]:
    """Return a measurement, from its earlier run if student, store and settings are the same."""
    record = Path(config.student) / RESULT
    identity = {
        "student": json.loads(record.read_text())["identity"] if record.is_file() else None,
        "store": open_store(config.store).digest,
        "config": config.model_dump(mode="json"),
    }
    kept = folder / METRICS
    if identity["student"] is not None and kept.is_file():
        earlier = json.loads(kept.read_text())
        if earlier["identity"] == identity:
            return dict(earlier["metrics"])
    found = evaluate(
        config.student, config.store, batch_size=config.batch_size, examples=config.examples, progress=go_on
    ).as_dict()
    write_object(folder, METRICS, json.dumps({"identity": identity, "metrics": found}, indent=2).encode())
    return found


__all__ = ["CHAIN", "ChainConfig", "ChainResult", "Planned", "StepResult", "plan", "run_chain"]
