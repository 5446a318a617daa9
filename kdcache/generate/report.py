"""How near students' answers come to the teacher's and to the references: BLEU, ROUGE, exact match."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdcache.config import parse_config
from kdcache.errors import SourceError
from kdcache.generate.ask import Asker
from kdcache.generate.config import AskConfig
from kdcache.generate.prompts import Prompt
from kdcache.generate.written import read_record
from kdcache.metrics import bleu, exact_match, rouge
from kdcache.teachers import TeacherConfig


@dataclass(frozen=True, slots=True)
class Likeness:
    """How like some answers are to others.

    Attributes:
        bleu: Of the whole, 0 to 100.
        rouge1: F-measure, 0 to 1, as are the next two.
        rouge2: Of pairs of words.
        rouge_l: Of the longest common subsequence.
        exact_match: Share of answers that are the other one, blanks at both ends apart.
        answers: Compared.
    """

    bleu: float
    rouge1: float
    rouge2: float
    rouge_l: float
    exact_match: float
    answers: int


@dataclass(frozen=True, slots=True)
class Row:
    """One who answered.

    Attributes:
        name: Of the table's line.
        teacher: Likeness to the teacher's answers; None of the teacher itself.
        reference: Likeness to the references; None where the source has none.
        tokens: Of an answer, the mean, its end not counted.
        ended: Share of answers that ended before max_new_tokens were spent.
        seconds: For all answers.
    """

    name: str
    teacher: Likeness | None
    reference: Likeness | None
    tokens: float
    ended: float
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """Who answered how.

    Attributes:
        answers: File of the teacher's.
        rows: The teacher, then the students in the order given.
    """

    answers: str
    rows: list[Row]

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return asdict(self)

    def markdown(self) -> str:
        """Return the table as Markdown: BLEU 0 to 100, ROUGE F-measures times 100, exact match in per cent."""
        names = ("BLEU", "ROUGE-1", "ROUGE-2", "ROUGE-L", "exact")
        head = ["", *(f"{one}, teacher" for one in names), *(f"{one}, reference" for one in names), "tokens", "ended"]
        lines = [head, ["---", *["---:"] * (len(head) - 1)]]
        lines += [
            [row.name, *_cells(row.teacher), *_cells(row.reference), f"{row.tokens:.1f}", f"{row.ended:.2f}"]
            for row in self.rows
        ]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def score(
    students: Mapping[str, Path | str],
    answers: Path | str,
    *,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Let students answer the prompts that the teacher answered, greedily, and compare.

    They get the teacher's max_new_tokens, stop strings and batch size, and the prompts as the teacher read them.

    Args:
        students: Name to the folder of a finished run, or of any causal language model of the transformers library.
        answers: A file that `generate` has finished, best one of prompts that no student has seen.
        device: Of the students.
        progress: Called with answers done and all of them, over all students.

    Raises:
        SourceError: There are no answers, or no record of how they were asked for.
        AccessError: A student does not load.
        ConfigError: sacrebleu is not installed.
    """
    path = Path(answers)
    lines = _read(path)
    asked = parse_config(AskConfig, {**read_record(path)["asked"], "temperature": 0.0}, where=str(path))
    prompts = [Prompt(one["id"], one["prompt"], one["template"]) for one in lines]
    said = [one["completion"] for one in lines]
    references = [one.get("reference") for one in lines]
    rows = [
        Row(
            "teacher",
            None,
            likeness(said, references),
            sum(one["tokens"] for one in lines) / len(lines),
            sum(one["ended"] for one in lines) / len(lines),
            None,
        )
    ]
    done = 0

    def told(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, len(prompts) * len(students))

    for name, folder in students.items():
        asker = Asker(TeacherConfig(model=str(folder), kind="transformers", device=device), asked)
        began = time.perf_counter()
        made = asker.ask(prompts, told)
        texts = ["" if one is None else one.text for one in made]  # a context too short for the prompt answers nothing
        rows.append(
            Row(
                name,
                likeness(texts, said),
                likeness(texts, references),
                sum(len(one.ids) for one in made if one) / len(made),
                sum(one.ended for one in made if one) / len(made),
                round(time.perf_counter() - began, 2),
            )
        )
    return Report(str(path), rows)


def likeness(ours: list[str], theirs: list[Any]) -> Likeness | None:
    """Return how like texts are to others, pair by pair; pairs whose other is None are left out.

    Returns:
        None where no pair is left.

    Raises:
        ConfigError: sacrebleu is not installed.
    """
    pairs = [(one.strip(), other.strip()) for one, other in zip(ours, theirs, strict=True) if other is not None]
    if not pairs:
        return None
    left, right = [one for one, _ in pairs], [other for _, other in pairs]
    words = rouge(left, right)
    return Likeness(bleu(left, right), words.rouge1, words.rouge2, words.rouge_l, exact_match(left, right), len(pairs))


def _cells(found: Likeness | None) -> list[str]:
    if found is None:
        return [""] * 5
    shares = (found.rouge1, found.rouge2, found.rouge_l, found.exact_match)
    return [f"{found.bleu:.1f}", *(f"{100 * one:.1f}" for one in shares)]


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    except OSError as error:
        raise SourceError(
            "There is no such file of answers.", where=str(path), hint="Finish `kdcache generate` first."
        ) from error
    except ValueError as error:
        raise SourceError(f"The answers are not JSON Lines: {error}.", where=str(path)) from error
    if not lines:
        raise SourceError("There is no answer to compare with.", where=str(path), hint="Loosen the filter.")
    return lines
