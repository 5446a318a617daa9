"""The keys of a chain."""

import re
from typing import Any

from pydantic import Field, model_validator

from kdcache.config import Section

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class EvalConfig(Section):
    """A student measured on a held-out store.

    Attributes:
        student: An earlier train step, or the folder of a student.
        store: An earlier capture step, or the folder or URL of a store.
        batch_size: Samples a batch.
        examples: Folder of the inputs of a classifier's store; default: the run's.
    """

    student: str
    store: str
    batch_size: int = Field(default=8, ge=1)
    examples: str | None = None


class GenerationsConfig(Section):
    """Steps that are done several times, each time on from the last.

    Attributes:
        count: How many times.
        first: What `${previous.NAME}` is the first time: step of the group to an earlier step, or a folder.
        steps: Of one generation. `${previous.NAME}` is the folder of the generation before, `${generation}` its number
            from 1; the folder of a step is `NAME-1`, `NAME-2`, ...; later steps find the last as `${NAME}`.
    """

    count: int = Field(ge=1)
    first: dict[str, str] = Field(default_factory=dict)
    steps: tuple["StepConfig", ...]


class StepConfig(Section):
    """One step: a name and one of capture, train and eval; or generations.

    Attributes:
        name: Letters, digits, `-` and `_`; its folder, and what later steps call it by.
        capture: Keys of a capture config, laid over those of `base.capture`.
        train: Keys of a training config, laid over those of `base.train`, and `store`: an earlier capture step, or the
            folder or URL of a store.
        eval: A student and a store.
        generations: Steps that are done several times; has no name.
    """

    name: str | None = None
    capture: dict[str, Any] | None = None
    train: dict[str, Any] | None = None
    eval: EvalConfig | None = None
    generations: GenerationsConfig | None = None

    @model_validator(mode="after")
    def _one(self) -> "StepConfig":
        if sum(one is not None for one in (self.capture, self.train, self.eval, self.generations)) != 1:
            raise ValueError("give exactly one of capture, train, eval and generations")
        if (self.name is None) != (self.generations is not None):
            raise ValueError("give a name; of generations, give none")
        if self.name is not None and not NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} is no name: use letters, digits, - and _")
        return self


class BaseConfig(Section):
    """What steps share.

    Attributes:
        capture: Keys under those of every capture step.
        train: Keys under those of every train step, `store` among them.
    """

    capture: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)


class ChainConfig(Section):
    """A chain. In any text of a step, `${NAME}` is the folder of an earlier step."""

    base: BaseConfig = BaseConfig()
    steps: tuple[StepConfig, ...]
