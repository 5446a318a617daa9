"""Documents to samples: tokenise, apply chat templates, split or pack, and spool the result to disk.

Legend: `S` samples, `L` tokens of a sample.

A document of n tokens gives exactly n - 1 positions, however it is cut: neighbouring windows share one token, so
every token but the first is predicted once. A sample has 2 <= L <= max_length tokens.
"""

import json
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from kdcache.config import Section
from kdcache.errors import ConfigError, SampleError, SourceError
from kdcache.fingerprint import canonical_json, digest_file, digest_json
from kdcache.sources import Document, Source

INDEX = "samples.json"
BATCH = 256
"""Texts handed to the tokenizer at a time."""


class SamplesConfig(Section):
    """How documents become samples.

    Attributes:
        max_length: Tokens of a sample at most; default: the teacher's context, but not over 1024.
        long: What becomes of a longer document: split into windows, truncate, skip (counted), or error.
        packing: none keeps documents apart; concat joins them with the end token and cuts windows of max_length.
        train_on: Which labels count: completion (answers only, where there is a prompt) or all.
        chat_template: Jinja text in place of the tokenizer's own.
        add_bos: Begin a text with the begin token; default: as the tokenizer itself does.
        add_eos: End a text with the end token.
        on_bad: What becomes of a document that is empty, or has an id outside the vocabulary: error or skip (counted).
    """

    max_length: int | None = None
    long: Literal["split", "truncate", "skip", "error"] = "split"
    packing: Literal["none", "concat"] = "none"
    train_on: Literal["completion", "all"] = "completion"
    chat_template: str | None = None
    add_bos: bool | None = None
    add_eos: bool = False
    on_bad: Literal["error", "skip"] = "error"


@dataclass(frozen=True, slots=True)
class SampleTokens:
    """One sample.

    Attributes:
        id: The document's id, with `#window` where it was cut.
        tokens: int64 [L].
        loss_mask: bool [L-1]; entry t is about the label tokens[t+1].
    """

    id: str
    tokens: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]


class SampleSet:
    """All samples of a capture, memory-mapped from their spool folder.

    Attributes:
        counts: Documents, samples and positions, and what was skipped, by reason.
        digest: Identity of the tokens, masks and ids.
    """

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self.counts: dict[str, int] = index["counts"]
        self.digest: str = index["digest"]
        self._ids: list[str] = json.loads((folder / "ids.json").read_text())
        self._offsets = np.fromfile(folder / "offsets.bin", dtype=np.int64)
        self._tokens = np.memmap(folder / "tokens.bin", dtype=np.int32, mode="r")
        self._mask = np.memmap(folder / "mask.bin", dtype=np.uint8, mode="r")

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, number: int) -> SampleTokens:
        start, stop = self._offsets[number], self._offsets[number + 1]
        return SampleTokens(
            self._ids[number],
            np.asarray(self._tokens[start:stop], dtype=np.int64),
            np.asarray(self._mask[start + 1 : stop], dtype=np.bool_),
        )

    @property
    def lengths(self) -> NDArray[np.int64]:
        """L of every sample [S]."""
        return np.diff(self._offsets)

    @property
    def num_positions(self) -> int:
        """The sum of L - 1."""
        return int(self._offsets[-1]) - len(self)


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A tokenised document; `counts` says of each token whether it counts as a label."""

    id: str
    ids: list[int]
    counts: list[bool]


def prepare(
    source: Source,
    tokenizer: Any,
    config: SamplesConfig,
    *,
    limits: tuple[int | None, int],
    identity: dict[str, Any],
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
) -> SampleSet:
    """Return the samples of a source; tokenised once, then found again in the folder.

    Args:
        source: The documents.
        tokenizer: A transformers tokenizer; None for sources of token ids.
        config: How they become samples.
        limits: The teacher's context in tokens (None: no limit known) and its vocabulary size.
        identity: What else fixes the samples (the tokenizer's fingerprint).
        folder: Where they are spooled.
        progress: Called with documents done and all.

    Raises:
        SampleError: A document is too long, empty or has an id outside the vocabulary, and the config says error.
        SourceError: No sample is left.
        ConfigError: max_length is beyond the teacher's context, or something needs a tokenizer.
    """
    context, vocabulary = limits
    length = longest(config, context)
    key = digest_json(
        {
            "source": source.fingerprint,
            "config": config.model_dump(),
            "length": length,
            "vocabulary": vocabulary,
            **identity,
        }
    )
    if (index := _spooled(folder, key)) is not None:
        return SampleSet(folder, index)
    own = folder.with_name(f"{folder.name}-{secrets.token_hex(4)}")  # other processes may be doing the same
    own.mkdir(parents=True)
    counts: Counter[str] = Counter()
    documents = _tokenised(source, tokenizer, config, counts, progress)
    usable = _usable(documents, config, vocabulary, counts)
    windows = (
        _packed(usable, tokenizer, length) if config.packing == "concat" else _windows(usable, config, length, counts)
    )
    try:
        digest = _spool(windows, own, counts)
        index = {"key": key, "counts": dict(sorted(counts.items())), "digest": digest}
        (own / INDEX).write_bytes(canonical_json(index))
        if not counts["samples"]:
            raise SourceError(
                "No sample of at least 2 tokens is left.",
                hint=f"Look at what was skipped: {dict(counts)}.",
            )
        made = SampleSet(own, index)  # whose files stay open, whatever becomes of their names
        if _spooled(folder, key) is None:
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # another process was faster, with the same samples
                own.rename(folder)
        return made
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _spooled(folder: Path, key: str) -> dict[str, Any] | None:
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text())
    except (OSError, ValueError):
        return None
    return index if index["key"] == key else None


def longest(config: SamplesConfig, context: int | None) -> int:
    """Return how many tokens a sample has at most.

    Raises:
        ConfigError: That is beyond the teacher's context, or less than two.
    """
    length = config.max_length or min(context or 1024, 1024)
    if length < 2:
        raise ConfigError(f"A sample of {length} tokens predicts nothing.", where="samples.max_length")
    if context is not None and length > context:
        raise ConfigError(
            f"max_length {length} is beyond the teacher's context of {context} tokens.",
            where="samples.max_length",
            hint=f"Set it to {context} or less.",
        )
    return length


def _tokenised(
    source: Source,
    tokenizer: Any,
    config: SamplesConfig,
    counts: Counter[str],
    progress: Callable[[int, int], None] | None,
) -> Iterator[_Tokens]:
    for start in range(0, len(source), BATCH):
        batch = [source[number] for number in range(start, min(start + BATCH, len(source)))]
        counts["documents"] += len(batch)
        texts = [document for document in batch if document.text is not None]
        if texts and tokenizer is None:
            raise ConfigError("The source holds text, and the teacher has no tokenizer.", where="teacher.tokenizer")
        plain = iter(tokenizer([document.text for document in texts])["input_ids"] if texts else [])
        for document in batch:
            try:
                if document.text is not None:
                    yield _text(document, next(plain), tokenizer, config)
                else:
                    yield _other(document, tokenizer, config)
            except SampleError:
                if config.on_bad == "error":
                    raise
                counts["skipped: chat template"] += 1
        if progress:
            progress(start + len(batch), len(source))


def _text(document: Document, ids: list[int], tokenizer: Any, config: SamplesConfig) -> _Tokens:
    ids = list(ids)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    starts = bool(ids) and begin is not None and ids[0] == begin
    if config.add_bos is True and not starts:
        if begin is None:
            raise ConfigError("The tokenizer has no begin token.", where="samples.add_bos")
        ids.insert(0, begin)
    if config.add_bos is False and starts:
        ids.pop(0)
    if config.add_eos and ids:
        if end is None:
            raise ConfigError("The tokenizer has no end token.", where="samples.add_eos")
        ids.append(end)
    return _Tokens(document.id, ids, [True] * len(ids))


def _other(document: Document, tokenizer: Any, config: SamplesConfig) -> _Tokens:
    if document.input_ids is not None:
        return _Tokens(document.id, document.input_ids, [True] * len(document.input_ids))
    if tokenizer is None:
        raise ConfigError("The source holds text, and the teacher has no tokenizer.", where="teacher.model")
    if document.messages is not None:
        text, spans = _chat(document, tokenizer, config)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    else:
        prompt, completion = cast(str, document.prompt), cast(str, document.completion)
        text, spans = prompt + completion, [(len(prompt), len(prompt) + len(completion))]
        encoded = tokenizer(text, return_offsets_mapping=True)
    counts = [
        config.train_on == "all" or any(start <= begin < stop for start, stop in spans)
        for begin, _ in encoded["offset_mapping"]
    ]
    ids = list(encoded["input_ids"])
    if document.messages is None and config.add_eos and tokenizer.eos_token_id is not None:
        return _Tokens(document.id, [*ids, tokenizer.eos_token_id], [*counts, True])
    return _Tokens(document.id, ids, counts)


def _chat(document: Document, tokenizer: Any, config: SamplesConfig) -> tuple[str, list[tuple[int, int]]]:
    """Return a chat as the template writes it, and where in the text the assistant's turns stand."""
    messages = document.messages or []

    def render(turns: list[dict[str, str]], prompt: bool) -> str:
        if not turns:
            return ""
        try:
            written: str = tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=prompt, chat_template=config.chat_template
            )
        except Exception as error:
            raise SampleError(
                f"The chat template refuses the messages: {error}.",
                where=document.id,
                hint="Give another samples.chat_template, or set samples.on_bad to skip.",
            ) from error
        return written

    text = render(messages, prompt=False)
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(messages[:turn], prompt=True), render(messages[: turn + 1], prompt=False)
        if not (after.startswith(before) and text.startswith(after)):
            raise SampleError(
                "The chat template writes a turn differently once more turns follow, so the answer has no place.",
                where=document.id,
                hint="Set samples.train_on to all, or give a samples.chat_template that only appends.",
            )
        spans.append((len(before), len(after)))
    return text, spans


def _usable(
    documents: Iterator[_Tokens], config: SamplesConfig, vocabulary: int, counts: Counter[str]
) -> Iterator[_Tokens]:
    for document in documents:
        reason, what = "", ""
        if len(document.ids) < 2:
            reason, what = "too short", f"The document has {len(document.ids)} tokens, and a position needs 2."
        elif min(document.ids) < 0 or max(document.ids) >= vocabulary:
            worst = max(document.ids, key=lambda one: abs(one - vocabulary / 2))
            reason = "id outside the vocabulary"
            what = f"The document has the token id {worst}, outside the teacher's vocabulary of {vocabulary}."
        if not reason:
            yield document
        elif config.on_bad == "skip":
            counts[f"skipped: {reason}"] += 1
        else:
            raise SampleError(
                what, where=document.id, hint="Mend the document, or set samples.on_bad=skip to leave such ones out."
            )


def _windows(
    documents: Iterator[_Tokens], config: SamplesConfig, length: int, counts: Counter[str]
) -> Iterator[_Tokens]:
    for document in documents:
        if len(document.ids) <= length:
            yield document
        elif config.long == "truncate":
            counts["truncated"] += 1
            yield _Tokens(document.id, document.ids[:length], document.counts[:length])
        elif config.long == "skip":
            counts["skipped: too long"] += 1
        elif config.long == "error":
            raise SampleError(
                f"The document has {len(document.ids)} tokens, over the limit of {length}.",
                where=document.id,
                hint="Set samples.long to split, truncate or skip, or raise samples.max_length.",
            )
        else:
            yield from _cut(document.id, document.ids, document.counts, length)


def _cut(name: str, ids: list[int], counts: list[bool], length: int) -> Iterator[_Tokens]:
    # the last token of a window is the first of the next: its own prediction stays in the earlier one
    for window, start in enumerate(range(0, len(ids) - 1, length - 1)):
        stop = start + length
        yield _Tokens(f"{name}#{window}", ids[start:stop], counts[start:stop])


def _packed(documents: Iterator[_Tokens], tokenizer: Any, length: int) -> Iterator[_Tokens]:
    end = getattr(tokenizer, "eos_token_id", None)
    if end is None:
        raise ConfigError("Packing joins documents with the end token, and there is none.", where="samples.packing")
    ids: list[int] = []
    counts: list[bool] = []
    number = 0
    for document in documents:
        # the first token of a document follows another document: its label does not count
        ids += document.ids if document.ids[-1] == end else [*document.ids, end]
        counts += [False, *document.counts[1:]] if document.ids[-1] == end else [False, *document.counts[1:], True]
        while len(ids) >= length:
            yield _Tokens(f"pack-{number:08d}", ids[:length], counts[:length])
            ids, counts, number = ids[length - 1 :], counts[length - 1 :], number + 1
    if len(ids) >= 2:
        yield _Tokens(f"pack-{number:08d}", ids, counts)


def _spool(samples: Iterator[_Tokens], folder: Path, counts: Counter[str]) -> str:
    ids: list[str] = []
    seen: set[str] = set()
    offsets = [0]
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "mask.bin").open("wb") as mask:
        for sample in samples:
            if sample.id in seen:
                raise SourceError(
                    f"Two documents have the id {sample.id!r}.", hint="Set source.id_field to a field that is unique."
                )
            seen.add(sample.id)
            ids.append(sample.id)
            tokens.write(np.asarray(sample.ids, dtype=np.int32).tobytes())
            mask.write(np.asarray(sample.counts, dtype=np.uint8).tobytes())
            offsets.append(offsets[-1] + len(sample.ids))
    np.asarray(offsets, dtype=np.int64).tofile(folder / "offsets.bin")
    (folder / "ids.json").write_text(json.dumps(ids))
    counts["samples"] = len(ids)
    counts["positions"] = offsets[-1] - len(ids)
    return digest_json([digest_file(folder / name) for name in ("tokens.bin", "mask.bin", "offsets.bin", "ids.json")])
