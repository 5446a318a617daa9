"""A causal language model that answers prompts in batches.

Legend: `S` prompts of a batch, `T` their padded length, `A` tokens of an answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kdcache.errors import ConfigError, TeacherError, TeacherMemoryError
from kdcache.generate.config import AskConfig
from kdcache.generate.draw import KeyedDraw
from kdcache.generate.prompts import Prompt
from kdcache.teachers import TeacherConfig, choose_device, load_teacher
from kdcache.teachers.transformers import TransformersTeacher

MARGIN = 8
"""Tokens before a stop string that are decoded with it, so that no character is seen in half."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said to one prompt.

    Attributes:
        text: Without the end.
        ids: Its tokens [A], without those of the end.
        ended: Whether an end token or a stop string came before max_new_tokens were spent.
        generated: Tokens the model made for it, the end's among them.
        same_tokens: Whether prompt and answer, tokenised as one text, are the tokens read and made here.
    """

    text: str
    ids: tuple[int, ...]
    ended: bool
    generated: int
    same_tokens: bool


class Asker:
    """A model and how it is asked; the weights load with the first prompt.

    Answers in float32 do not depend on what else is in the batch, up to ties of rounding. In a shorter dtype they may:
    the same prompts in the same batches give the same answers on the same machine.

    Raises:
        ConfigError: The model is not one of the transformers library, or there is no such device.
        AccessError: It is not there.
    """

    def __init__(self, model: TeacherConfig, config: AskConfig) -> None:
        teacher = load_teacher(model)
        if not isinstance(teacher, TransformersTeacher):
            raise ConfigError(
                "Only models of the transformers library generate answers here.",
                where="teacher.kind",
                hint="Give a folder with config.json and safetensors, a hub name, or a GGUF file.",
            )
        self._config = config
        self._teacher = teacher
        self._device = choose_device(model.device)
        self.fingerprint = teacher.fingerprint
        self.tokenizer = teacher.tokenizer()
        self._context = teacher.max_length

    def ask(self, prompts: Sequence[Prompt], done: Callable[[int], None] | None = None) -> list[Answer | None]:
        """Return the answers to some prompts, in their order; None where prompt and answer exceed the context.

        Args:
            prompts: At least one.
            done: Called after every batch with how many prompts it held.

        Raises:
            TeacherError: A prompt has no token, or the model failed.
            TeacherMemoryError: Out of memory even at one prompt.
        """
        tokens: list[list[int]] = [list(one) for one in self.tokenizer([one.text for one in prompts])["input_ids"]]
        if empty := [one.id for one, ids in zip(prompts, tokens, strict=True) if not ids]:
            raise TeacherError("The prompt has no token.", where=empty[0], hint="Leave it out, or give a template.")
        room = float("inf") if self._context is None else self._context - self._config.max_new_tokens
        # prompts of like length together: less padding
        order = sorted((n for n in range(len(prompts)) if len(tokens[n]) <= room), key=lambda n: len(tokens[n]))
        answers: list[Answer | None] = [None] * len(prompts)
        for start in range(0, len(order), self._config.batch_size):
            batch = order[start : start + self._config.batch_size]
            made = self._batch([prompts[n] for n in batch], [tokens[n] for n in batch])
            for number, answer in zip(batch, made, strict=True):
                answers[number] = answer
            if done:
                done(len(batch))
        return answers

    def _batch(self, prompts: list[Prompt], tokens: list[list[int]]) -> list[Answer]:
        rows: list[list[int]] | None
        try:
            rows = self._generate(prompts, tokens)
        except torch.OutOfMemoryError as error:
            if len(prompts) == 1:
                raise TeacherMemoryError(
                    "Out of memory at one prompt.", where=prompts[0].id, hint="Lower max_new_tokens."
                ) from error
            rows = None  # the smaller batches run outside, where the error holds no tensors
        except (ValueError, TypeError, IndexError, AttributeError) as error:
            raise TeacherError(f"The model failed: {error}.", where=self.fingerprint["name"]) from error
        if rows is None:
            half = len(prompts) // 2
            return self._batch(prompts[:half], tokens[:half]) + self._batch(prompts[half:], tokens[half:])
        return [self._answer(*one) for one in zip(prompts, tokens, rows, strict=True)]

    @torch.inference_mode()
    def _generate(self, prompts: list[Prompt], tokens: list[list[int]]) -> list[list[int]]:
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        longest, config = max(map(len, tokens)), self._config
        pad = next(iter(self._ends), 0)
        # padded on the left, so that every answer begins in the same column
        ids = torch.tensor([[pad] * (longest - len(one)) + one for one in tokens], device=self._device)
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in tokens], device=self._device)
        draws = [KeyedDraw([one.id for one in prompts], longest, config.temperature, config.top_p, config.seed)]
        stops = [self._stopper(longest)]
        out: Tensor = self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                max_new_tokens=config.max_new_tokens,
                do_sample=False,
                pad_token_id=pad,
                eos_token_id=list(self._ends) or None,
            ),
            logits_processor=LogitsProcessorList(draws if config.temperature else []),
            stopping_criteria=StoppingCriteriaList(stops if config.stop else []),
        )
        rows: list[list[int]] = out[:, longest:].tolist()
        return rows

    def _stopper(self, start: int) -> Callable[..., Tensor]:
        """Return a function that says of each row whether its answer, from a column on, ends in a stop string."""
        window = MARGIN + max((len(one.encode()) for one in self._config.stop), default=0)

        def stopped(input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
            tails = input_ids[:, max(start, input_ids.shape[1] - window) :]
            found = [any(stop in text for stop in self._config.stop) for text in map(self._text, tails.tolist())]
            return torch.tensor(found, device=input_ids.device)

        return stopped

    def _answer(self, prompt: Prompt, before: list[int], row: list[int]) -> Answer:
        end = next((place for place, one in enumerate(row) if one in self._ends), len(row))
        ids, ended, generated = row[:end], end < len(row), min(end + 1, len(row))
        text = self._text(ids)
        if places := [place for stop in self._config.stop if (place := text.find(stop)) >= 0]:
            # behind a stop string there is padding, which may look like an end token
            text, ended, generated = text[: min(places)], True, len(ids)
            while ids and len(self._text(ids)) > len(text):
                ids = ids[:-1]
        whole = list(self.tokenizer(prompt.text + text)["input_ids"])
        return Answer(text, tuple(ids), ended, generated, whole == before + ids)

    def _text(self, ids: Sequence[int]) -> str:
        # special tokens stay visible: an answer that holds one is no plain text, and a capture reads it as it was
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    @property
    def _model(self) -> Any:
        return self._loaded[0]

    @property
    def _ends(self) -> tuple[int, ...]:
        return self._loaded[1]

    @cached_property
    def _loaded(self) -> tuple[Any, tuple[int, ...]]:
        """The model, and the ids that end its answers by everyone who knows some."""
        from transformers import GenerationConfig

        model = self._teacher.model
        text = model.config.get_text_config()
        known = [getattr(model.generation_config, "eos_token_id", None), text.eos_token_id, self.tokenizer.eos_token_id]
        flat = [one for ids in known for one in (ids if isinstance(ids, list | tuple) else [ids]) if one is not None]
        # a checkpoint's own habits (sampling, penalties) would fill every key that is left open
        model.generation_config = GenerationConfig()
        text.use_cache = True  # this teacher answers, and captures nothing
        return model, tuple(sorted({int(one) for one in flat}))
