"""The teacher answers prompts; the answers become a source that a capture reads.

Sequence-level distillation (Kim and Rush 2016) trains on what the teacher says. The answers are JSON Lines with
`prompt` and `completion`, so a capture of them keeps the teacher's logits of the answers' tokens, and a training run
may use both. Where every answer has ended (`filter.must_end`), `samples.add_eos` teaches the student to end.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from kdcache.errors import Interrupted
from kdcache.fingerprint import digest_file
from kdcache.generate.ask import Answer, Asker
from kdcache.generate.config import AskConfig, FilterConfig, GenerateConfig
from kdcache.generate.keep import reason
from kdcache.generate.prompts import Prompt, open_prompts, prompts_of
from kdcache.generate.written import AnswerFile, Tally
from kdcache.process import stop_signals
from kdcache.sources import Source
from kdcache.tokenizer import tokenizer_fingerprint


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """How a generation ended; counts and seconds are of all its runs.

    Attributes:
        path: Of the answers.
        prompts: Asked, templates multiplied out.
        answers: Kept.
        dropped: Reason to count of those that were not.
        cut: Answers that spent max_new_tokens, kept or not.
        other_tokens: Answers that are other tokens when prompt and answer are tokenised as one text, kept or not.
        tokens: Made by the model, those of dropped answers among them.
        seconds: Of the model, its loading included.
        tokens_per_second: Of the model.
        digest: Of the answers' bytes.
        already_complete: Whether there was nothing to do.
    """

    path: str
    prompts: int
    answers: int
    dropped: dict[str, int]
    cut: int
    other_tokens: int
    tokens: int
    seconds: float
    tokens_per_second: float
    digest: str
    already_complete: bool = field(default=False)

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return asdict(self)


def generate(
    config: GenerateConfig, out: Path | str, *, progress: Callable[[int, int], None] | None = None
) -> GenerateResult:
    """Write the teacher's answers to a source's prompts as JSON Lines.

    A line holds id, prompt (as the teacher read it), completion, template (its number), tokens (of the answer, its end
    not counted), ended, and reference where the source has one. Lines stand in the order of the source. Killed at any
    moment, the same call goes on from the last finished chunk and ends in the same bytes; finished, it does nothing.
    The same config and machine give the same bytes.

    Args:
        config: Prompts, teacher and filter.
        out: File of the answers; its record stands beside it, under the name with `.json` appended.
        progress: Called after every batch with prompts done and all.

    Raises:
        SourceError: There is no prompt, a document is none, or two have one id.
        ConfigError: The teacher cannot generate, or has no chat template where one is wanted.
        AccessError: The teacher is not there, or the file may not be written.
        MismatchError: The file was begun with another source, teacher, tokenizer or config.
        TeacherError: The teacher failed.
        Interrupted: Stopped on request.
    """
    path = Path(out)
    source = open_prompts(config.source)
    asker = Asker(config.teacher, config)
    own = config.model_dump(mode="json", exclude={"source": True, "teacher": {"model", "device"}})
    identity = {
        "source": source.fingerprint,
        "teacher": asker.fingerprint,
        "tokenizer": tokenizer_fingerprint(asker.tokenizer),
        "config": own,
    }
    asked = {name: own[name] for name in AskConfig.model_fields}
    file = AnswerFile.open(path, identity, asked)
    if file.complete:
        return _result(path, file.tally, already_complete=True)
    asked_now = file.tally.prompts
    with stop_signals() as stopped:

        def told(count: int) -> None:
            nonlocal asked_now
            asked_now += count
            if progress:
                progress(asked_now, len(source) * len(config.templates))
            if stopped.is_set():
                raise Interrupted(
                    "The generation was stopped; finished chunks are kept.",
                    where=str(path),
                    hint="Run the same command again to go on.",
                )

        for chunk in range(file.chunks, -(-len(source) // config.chunk_prompts)):
            began = time.perf_counter()
            pairs = _ask_chunk(config, source, asker, chunk, told)
            lines, tally = _lines(pairs, config, file.tally)
            file.append(lines, replace(tally, seconds=round(tally.seconds + time.perf_counter() - began, 3)))
            asked_now = tally.prompts  # prompts that were too long were in no batch
    file.finish()
    return _result(path, file.tally, already_complete=False)


def _ask_chunk(
    config: GenerateConfig, source: Source, asker: Asker, chunk: int, told: Callable[[int], None]
) -> list[tuple[Prompt, Answer | None]]:
    first = chunk * config.chunk_prompts
    prompts = [
        prompt
        for number in range(first, min(first + config.chunk_prompts, len(source)))
        for prompt in prompts_of(source[number], config.templates, asker.tokenizer, chat=config.chat)
    ]
    return list(zip(prompts, asker.ask(prompts, told), strict=True))


def _lines(
    pairs: list[tuple[Prompt, Answer | None]], config: GenerateConfig, before: Tally
) -> tuple[list[dict[str, Any]], Tally]:
    """Return the lines of the answers that are kept, and the tally with all of them."""
    lines: list[dict[str, Any]] = []
    kept: dict[str, list[str]] = {}
    dropped = Counter(before.dropped)
    for prompt, answer in pairs:
        others = kept.setdefault(prompt.id.rpartition("~")[0], [])
        why = reason(answer, config.filter, others)
        if answer is None or why is not None:
            dropped[why or ""] += 1
            continue
        others.append(answer.text)
        line = {
            "id": prompt.id,
            "prompt": prompt.text,
            "completion": answer.text,
            "template": prompt.template,
            "tokens": len(answer.ids),
            "ended": answer.ended,
        }
        lines.append(line if prompt.reference is None else {**line, "reference": prompt.reference})
    said = [answer for _, answer in pairs if answer is not None]
    tally = Tally(
        prompts=before.prompts + len(pairs),
        answers=before.answers + len(lines),
        dropped=dict(sorted(dropped.items())),
        tokens=before.tokens + sum(one.generated for one in said),
        cut=before.cut + sum(not one.ended for one in said),
        other_tokens=before.other_tokens + sum(not one.same_tokens for one in said),
        seconds=before.seconds,
    )
    return lines, tally


def _result(path: Path, tally: Tally, *, already_complete: bool) -> GenerateResult:
    return GenerateResult(
        path=str(path),
        **asdict(tally),
        tokens_per_second=round(tally.tokens / tally.seconds, 1) if tally.seconds else 0.0,
        digest=digest_file(path),
        already_complete=already_complete,
    )


__all__ = ["AskConfig", "FilterConfig", "GenerateConfig", "GenerateResult", "generate"]
