"""The quality filter: why an answer is dropped."""

from collections.abc import Iterable, Sequence

from kdcache.generate.ask import Answer
from kdcache.generate.config import FilterConfig

RUN = 4
"""Tokens of the runs whose repetition is measured."""


def reason(answer: Answer | None, config: FilterConfig, others: Iterable[str] = ()) -> str | None:
    """Return why an answer is dropped, the first of all reasons; None where it is kept.

    Args:
        answer: None of a prompt that was too long to be asked.
        config: What is wanted.
        others: Texts of the prompt's answers that were kept before.
    """
    if answer is None:
        return "prompt too long"
    checks = {
        "empty": not answer.text.strip(),
        "too short": len(answer.ids) < config.min_tokens,
        "too long": config.max_tokens is not None and len(answer.ids) > config.max_tokens,
        "not ended": config.must_end and not answer.ended,
        "repeats itself": repeated(answer.ids) > config.max_repeat,
        "other tokens": config.same_tokens and not answer.same_tokens,
        "equal": config.unique and answer.text.strip() in {one.strip() for one in others},
    }
    return next((name for name, found in checks.items() if found), None)


def repeated(ids: Sequence[int]) -> float:
    """Return the share, 0 to 1, of the runs of four tokens that have stood before; 0 where there is no run."""
    runs = [tuple(ids[place : place + RUN]) for place in range(len(ids) - RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
