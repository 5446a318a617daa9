"""A chain laid out before its first step: names put in place, every config read, every mistake said."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from kdcache import registry
from kdcache.capture.config import CaptureConfig
from kdcache.chain.config import BaseConfig, ChainConfig, EvalConfig, GenerationsConfig, StepConfig
from kdcache.config import parse_config
from kdcache.errors import ConfigError
from kdcache.seeds import merged
from kdcache.train.config import TrainConfig

PLACE = re.compile(r"\$\{([^}]*)\}")


@dataclass(frozen=True, slots=True)
class Planned:
    """One step, ready to run.

    Attributes:
        name: Of the step and of its folder.
        kind: What it does.
        folder: Where.
        config: Of a capture, a training or a measurement.
        store: That a training reads.
    """

    name: str
    kind: Literal["capture", "train", "eval"]
    folder: Path
    config: CaptureConfig | TrainConfig | EvalConfig
    store: str = ""


def plan(config: ChainConfig, out: Path | str) -> list[Planned]:
    """Return the steps of a chain in their order, generations laid out, every config read.

    Args:
        config: The chain.
        out: Its folder.

    Raises:
        ConfigError: A key or a name is not known (the nearest is named), a value does not fit, or a name comes twice.
    """
    made = _Plan(config.base, Path(out))
    made.add(config.steps)
    if not made.steps:
        raise ConfigError("The chain has no steps.", where="steps")
    return made.steps


@dataclass(slots=True)
class _Plan:
    """Steps so far, and what names stand for in the next one."""

    base: BaseConfig
    root: Path
    steps: list[Planned] = field(default_factory=list)
    known: dict[str, Planned] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    def add(self, steps: Sequence[StepConfig], suffix: str = "") -> None:
        for step in steps:
            if step.generations is not None:
                if suffix:
                    raise ConfigError("Generations do not stand inside generations.", where="generations")
                self._generations(step.generations)
                continue
            name = f"{step.name}{suffix}"
            self._require_new(name)
            made = self._planned(step, name)
            self.steps.append(made)
            self.known[name] = self.known[str(step.name)] = made

    def _generations(self, own: GenerationsConfig) -> None:
        names = [str(one.name) for one in own.steps]
        for name in names:
            self._require_new(name)
        for name in own.first:
            _require_known(name, names, "generations.first")
        previous = {name: self._folder(value, None, "generations.first") for name, value in own.first.items()}
        for number in range(1, own.count + 1):
            self.texts = {"generation": str(number)} | {f"previous.{name}": one for name, one in previous.items()}
            self.add(own.steps, f"-{number}")
            previous = {name: str(self.known[name].folder) for name in names}
        self.texts = {}

    def _require_new(self, name: str) -> None:
        if name in self.known:
            raise ConfigError(f"Two steps are called {name!r}.", where="steps")

    def _planned(self, step: StepConfig, name: str) -> Planned:
        where, folder = f"step {name}", self.root / name
        if step.capture is not None:
            tree = self._filled(merged(self.base.capture, step.capture), where)
            config = parse_config(CaptureConfig, tree, where=where)
            self._require_teacher(config, where)
            return Planned(name, "capture", folder, config)
        if step.train is not None:
            tree = self._filled(merged(self.base.train, step.train), where)
            store = tree.pop("store", None)
            if not isinstance(store, str):
                raise ConfigError("key 'train.store' is missing.", where=where, hint="Name a capture step before it.")
            found = self._folder(store, "capture", where)
            return Planned(name, "train", folder, parse_config(TrainConfig, tree, where=where), found)
        assert step.eval is not None  # the config has looked
        own = EvalConfig(**self._filled(step.eval.model_dump(), where))
        named = {
            "student": self._folder(own.student, "train", where),
            "store": self._folder(own.store, "capture", where),
        }
        return Planned(name, "eval", folder, own.model_copy(update=named))

    def _filled(self, value: Any, where: str) -> Any:
        if isinstance(value, Mapping):
            return {key: self._filled(one, where) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [self._filled(one, where) for one in value]
        return PLACE.sub(lambda match: self._named(match[1], where), value) if isinstance(value, str) else value

    def _named(self, name: str, where: str) -> str:
        values = {one: str(step.folder) for one, step in self.known.items()} | self.texts
        _require_known(name, values, where)
        return values[name]

    def _folder(self, value: str, kind: str | None, where: str) -> str:
        """Return where a step of a name or a path is."""
        step = self.known.get(value)
        if step is None and not (set(value) & set("/:") or Path(value).exists()):
            _require_known(value, self.known, where)
        if step is not None and kind not in (None, step.kind):
            raise ConfigError(f"The step {value!r} is a {step.kind}, and a {kind} is wanted.", where=where)
        return value if step is None else str(step.folder)

    def _require_teacher(self, config: CaptureConfig, where: str) -> None:
        if config.examples is None and config.teacher.kind in ("student", "ensemble"):
            raise ConfigError(
                f"A teacher of kind {config.teacher.kind} answers for examples, and the step has a source.",
                where=where,
                hint="A causal language model that was trained before is a folder: leave teacher.kind out.",
            )
        if config.teacher.kind != "auto":
            registry.find("kdcache.teachers" if config.examples is None else "kdcache.classifiers", config.teacher.kind)
        made = next((one for one in self.steps if str(one.folder) == config.teacher.model), None)
        if made is None or not isinstance(made.config, TrainConfig):
            return
        if config.examples is None and made.config.student.factory is not None:
            raise ConfigError(
                f"The student of {made.name} is made by a factory: there is no folder that runs it over a source.",
                where=where,
                hint="Give it student.config in place of student.factory.",
            )


def _require_known(name: str, known: Iterable[str], where: str) -> None:
    names = sorted(known)
    if name in names:
        return
    close = get_close_matches(name, names, n=1)
    hint = f"Did you mean {close[0]!r}?" if close else f"Known here: {', '.join(names) or 'nothing yet'}."
    if name.startswith("previous.") and not any(one.startswith("previous.") for one in names):
        hint = "Say in generations.first what it is the first time."
    raise ConfigError(f"{name!r} names no earlier step.", where=where, hint=hint)
