"""The keys of a generation; `source.path` and `teacher.model` are enough."""

from pydantic import Field, field_validator

from kdcache.config import Section
from kdcache.sources import SourceConfig
from kdcache.teachers import TeacherConfig

PLACE = "{prompt}"
"""Where a template has the prompt."""


class FilterConfig(Section):
    """Which answers are kept; an empty one never is.

    Attributes:
        min_tokens: Of an answer, its end not counted.
        max_tokens: The same, at most.
        max_repeat: Share of an answer's runs of four tokens that have stood in it before, 0 to 1, at most.
        must_end: Drop an answer that max_new_tokens cut off.
        same_tokens: Drop an answer that is other tokens once prompt and answer are tokenised as one text, as a capture
            will do; they are counted in any case.
        unique: Of equal answers to one prompt, keep the first.
    """

    min_tokens: int = Field(default=1, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_repeat: float = Field(default=1.0, ge=0, le=1)
    must_end: bool = False
    same_tokens: bool = False
    unique: bool = False


class AskConfig(Section):
    """How a model is asked.

    Attributes:
        batch_size: Prompts a batch; halved on out-of-memory.
        max_new_tokens: Of an answer.
        stop: Strings that end an answer and are no part of it; the model's end tokens always end it.
        temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(z / temperature).
        top_p: Draw from the likeliest tokens that have this probability together (nucleus sampling, Holtzman 2020).
        seed: Of the draws.
    """

    batch_size: int = Field(default=16, ge=1)
    max_new_tokens: int = Field(default=128, ge=1)
    stop: tuple[str, ...] = ()
    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int = 0

    @field_validator("stop")
    @classmethod
    def _some_text(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(value):
            raise ValueError("an empty string would end every answer before it begins")
        return value


class GenerateConfig(AskConfig):
    """Prompts, a model that answers them, and which answers are kept.

    Attributes:
        source: The prompts: records with a prompt and perhaps a completion, which becomes the reference; or text. A
            record's text field is only read where `source.text_field` is set.
        templates: Texts with {prompt} in them; every prompt is asked once with each. Where tokens are drawn, the same
            template given twice gives two answers.
        chat: Ask through the tokenizer's chat template, as the user's only turn.
        chunk_prompts: Prompts (of the source) answered together: what at most is lost when the run is killed.
    """

    source: SourceConfig
    teacher: TeacherConfig
    templates: tuple[str, ...] = Field(default=(PLACE,), min_length=1)
    chat: bool = False
    chunk_prompts: int = Field(default=64, ge=1)
    filter: FilterConfig = FilterConfig()

    @field_validator("templates")
    @classmethod
    def _has_a_place(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if lacking := [one for one in value if PLACE not in one]:
            raise ValueError(f"the template {lacking[0]!r} has no {PLACE}")
        return value
