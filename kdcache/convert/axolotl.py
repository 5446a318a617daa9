"""axolotl's JSON Lines of log-probabilities: read as its data sets have them, written as its trainer takes them.

Legend: `L` tokens of a sample, `C` candidates of a position.

Read are lines of three forms (`integrations/kd` of axolotl, read in November 2026), the last one written too:

- `messages` and a list of `{"token": "token_id:N", "logprob": x}` a token, as collected from vLLM (`field`);
- `messages`, a list of C log-probabilities a token (`field`) and `target_token_ids`;
- `input_ids`, `labels`, `target_logprobs`, `target_token_ids`, `target_mask`: tokenised.

The first two are about the last tokens of the chat, one list a token that was predicted; `null` is a token nothing is
told of. The third has one row a token, about the next one. Where the labels are much more often among the candidates
of a neighbouring row, the lists are off by one token, as those of some servers are, and are refused.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.convert import Reading, Source, files_in
from kdcache.convert.nested import ragged
from kdcache.convert.parquet import tokens_of
from kdcache.errors import ConfigError, SourceError
from kdcache.store import Store
from kdcache.store.schema import COUNTS
from kdcache.store.told import Told
from kdcache.tokenizer import load_tokenizer

IGNORED = -100
MESSAGES = ("messages", "messages_combined", "conversations")
FAR = -1e9
"""What axolotl puts for a log-probability that is none."""


class Axolotl:
    """See the module."""

    suffix = ".jsonl"

    def read(self, path: Path, reading: Reading) -> Source:
        """Return what lies in a file or folder of JSON Lines."""
        files = files_in(path, self.suffix)
        tokens = _chat_tokens(reading)

        def samples() -> Iterator[Told]:
            for place, line in _lines(files):
                try:
                    sample = (
                        _tokenised(place, line) if "target_logprobs" in line else _chat(place, line, reading, tokens)
                    )
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    raise SourceError(
                        f"The line is not axolotl's: {error!r}.",
                        where=place,
                        hint=f"It needs messages and {reading.field!r} (--field), or the tokenised fields.",
                    ) from error
                _require_aligned(sample)
                yield sample

        count = sum(1 for _ in _lines(files))
        return Source(samples, count, None, "float32", files, ("The tail is known at T = 1 only.",))

    def begin(self, store: Store, folder: Path) -> None:
        """Nothing comes before the first shard."""

    def write(self, store: Store, index: int, path: Path) -> None:
        """Write a shard's samples, tokenised: one row of candidates a token, the last of them padding."""
        shard = store.read_shard(index)
        targets = shard.targets()
        assert targets is not None  # their columns are always there
        values = (targets.logits - targets.log_partition(1.0)[:, None]).clip(FAR)
        tokens, counts = tokens_of(shard.columns, shard.offsets), shard.columns["loss_mask"] == COUNTS
        with path.open("w") as file:
            for number, own in enumerate(tokens):
                rows = slice(int(shard.offsets[number]), int(shard.offsets[number + 1]))
                mask = np.append(counts[rows], False)
                line = {
                    "input_ids": own.tolist(),
                    "attention_mask": [1] * len(own),
                    "labels": [IGNORED, *np.where(counts[rows], own[1:], IGNORED).tolist()],
                    "target_logprobs": [*np.round(values[rows], 5).tolist(), [FAR] * targets.k],
                    "target_token_ids": [*targets.ids[rows].tolist(), list(range(targets.k))],
                    "target_mask": np.repeat(mask[:, None].astype(int), targets.k, 1).tolist(),
                    "sample_id": shard.table["sample_id"][number].as_py(),
                }
                file.write(json.dumps(line) + "\n")

    def lost(self, store: Store) -> list[str]:
        """Return what does not come along."""
        return [
            "The tail's log-partition stays behind: axolotl rescales the kept entries to sum to 1 (kd_normalize_topk).",
            "Labels' logits, hidden features, draws and all fingerprints stay behind; numbers are rounded to 1e-5.",
        ]


def _lines(files: tuple[Path, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in files:
        with file.open("rb") as lines:
            for number, line in enumerate(lines):
                if not line.strip():
                    continue
                place = f"{file.name}:{number}"
                try:
                    found = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise SourceError(f"The line is no JSON: {error}.", where=place) from error
                if not isinstance(found, dict):
                    raise SourceError("The line is no JSON object.", where=place)
                yield place, found


def _chat_tokens(reading: Reading) -> Callable[[Any], list[int]]:
    tokenizer = None if reading.tokenizer is None else load_tokenizer(reading.tokenizer)

    def tokens(messages: Any) -> list[int]:
        if tokenizer is None:
            raise ConfigError(
                "The lines hold messages, and tokens are needed.",
                where="--tokenizer",
                hint="Give the folder or name of the teacher's tokenizer, whose chat template was used.",
            )
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:
            raise SourceError(f"The chat template refuses the messages: {error}.", where="--tokenizer") from error
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return tokens


def _tokenised(place: str, line: dict[str, Any]) -> Told:
    tokens = np.asarray(line["input_ids"], dtype=np.int64)
    rows = len(tokens) - 1
    counts = np.asarray(line["labels"][1:]) != IGNORED
    mask = np.asarray([any(row) for row in line["target_mask"]], dtype=bool)[:rows]
    ids, values = _rectangles(line["target_token_ids"][:rows], line["target_logprobs"][:rows])
    values = np.where(mask[:, None] & (values > FAR), values, -np.inf).astype(np.float32)
    if len(ids) != rows or len(counts) != rows or len(mask) != rows:
        raise ValueError(f"{len(tokens)} tokens need as many labels and rows of candidates")
    return Told(str(line.get("sample_id", place)), tokens, counts & mask, ids, values)


def _chat(place: str, line: dict[str, Any], reading: Reading, tokenise: Callable[[Any], list[int]]) -> Told:
    said = line[reading.field]
    messages = next((line[name] for name in MESSAGES if name in line), None)
    tokens = np.asarray(line["input_ids"] if messages is None else tokenise(messages), dtype=np.int64)
    rows = len(tokens) - 1
    if len(said) > len(tokens):
        raise ValueError(f"{len(said)} lists of log-probabilities for {len(tokens)} tokens")
    if "target_token_ids" in line:
        ids, values = _rectangles(line["target_token_ids"], said)
    else:
        pairs = [row or [] for row in said]
        ids, values = _rectangles(
            [[int(str(one["token"]).split(":")[-1]) for one in row] for row in pairs],
            [[one["logprob"] for one in row] for row in pairs],
        )
    ids, values = ids[-rows:], values[-rows:]  # a first token is predicted by nothing
    missing = rows - len(ids)
    counts = np.concatenate([np.zeros(missing, dtype=bool), np.isfinite(values).any(1)])
    ids = np.concatenate([np.full((missing, ids.shape[1]), -1, dtype=np.int64), ids])
    values = np.concatenate([np.full((missing, values.shape[1]), -np.inf, dtype=np.float32), values])
    return Told(str(line.get("id", place)), tokens, counts, ids, values)


def _rectangles(ids: Any, values: Any) -> tuple[Any, Any]:
    ids, values = [row or [] for row in ids], [row or [] for row in values]
    lengths = np.asarray([len(row) for row in ids], dtype=np.int64)
    if lengths.tolist() != [len(row) for row in values]:
        raise ValueError("as many ids as log-probabilities are due")
    flat_ids = np.asarray([one for row in ids for one in row], dtype=np.int64)
    flat = np.asarray([-np.inf if one is None else one for row in values for one in row], dtype=np.float32)
    return ragged(flat_ids, lengths, "int64", -1), ragged(flat, lengths, "float32", -np.inf)


def _require_aligned(sample: Told) -> None:
    """Refuse candidates that fit the token before or after much better than the one that they are about."""
    counted = np.flatnonzero(sample.counts)
    if len(counted) < 8:
        return
    found = {}
    for shift in (-1, 0, 1):
        rows = counted[(counted + shift >= 0) & (counted + shift < len(sample.counts))]
        here = np.isfinite(sample.log_probabilities[rows]) & (
            sample.ids[rows] == sample.tokens[rows + 1 + shift][:, None]
        )
        found[shift] = float(here.any(1).mean())
    best = max(found, key=lambda shift: found[shift])
    if best and found[best] > found[0] + 0.25:
        raise SourceError(
            f"The candidates fit the token {'after' if best > 0 else 'before'} theirs: {found[best]:.0%} of them hold "
            f"it, {found[0]:.0%} the one that they should be about.",
            where=sample.id,
            hint="The lists are off by one token, as those of some servers are, or the chat template is another.",
        )


plugin = Axolotl
