"""Data before the tokenizer: a source is a random-access sequence of documents with an identity.

One file is one kind of source; `plugin(config)` opens it. Sources are deterministic and never import torch.
"""

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from kdcache import registry
from kdcache.config import Section
from kdcache.errors import AccessError, SourceError

SUFFIXES = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonl.gz": "jsonl",
    ".parquet": "parquet",
}


class SourceConfig(Section):
    """Where the data are and which of their fields are read.

    Attributes:
        path: A file, a folder, a glob pattern, or a data set's hub name (kind huggingface).
        kind: text, jsonl, parquet, huggingface or a plug-in's name; auto goes by the files' suffix.
        documents: For text files, what one document is: the file, a line, or a paragraph (blank-line separated).
        text_field: Field with a document's text.
        messages_field: Field with a chat: a list of {role, content}.
        prompt_field: Field with a prompt, used together with `completion_field`.
        completion_field: Field with the answer to the prompt.
        input_ids_field: Field with token ids made elsewhere.
        id_field: Field with a stable id; default: file name and number.
        split: Of a Hugging Face data set.
        name: Configuration of a Hugging Face data set.
        revision: Of a Hugging Face data set.
        offset: Documents to leave out at the beginning.
        limit: Documents to read at most.
    """

    path: str
    kind: str = "auto"
    documents: Literal["file", "line", "paragraph"] = "file"
    text_field: str = "text"
    messages_field: str = "messages"
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    input_ids_field: str = "input_ids"
    id_field: str | None = None
    split: str = "train"
    name: str | None = None
    revision: str | None = None
    offset: int = 0
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """One item of a source; exactly one of text, messages, prompt with completion, input_ids is set.

    Attributes:
        id: Stable and unique within the source.
        text: Plain text.
        messages: A chat.
        prompt: What precedes `completion` and is not trained on.
        completion: The answer.
        input_ids: Token ids made elsewhere.
    """

    id: str
    text: str | None = None
    messages: list[dict[str, str]] | None = None
    prompt: str | None = None
    completion: str | None = None
    input_ids: list[int] | None = None


class Source(Protocol):
    """A deterministic sequence of documents."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Identity of the ordered content; holds no absolute path."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...


@dataclass(frozen=True, slots=True)
class Slice:
    """A run of another source's documents."""

    source: Source
    start: int
    count: int

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Identity of the whole and of the cut."""
        return {**self.source.fingerprint, "offset": self.start, "limit": self.count}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.source[self.start + index]


def open_source(config: SourceConfig) -> Source:
    """Return the source that a config names.

    Raises:
        SourceError: Missing, unreadable or empty data, or files of no known kind.
        ConfigError: No such kind.
    """
    kind = _guess(config.path) if config.kind == "auto" else config.kind
    source: Source = registry.find("kdcache.sources", kind)(config)
    if len(source) == 0:
        raise SourceError("The source is empty: it has no document.", where=config.path)
    if config.offset == 0 and config.limit is None:
        return source
    count = max(0, len(source) - config.offset)
    count = count if config.limit is None else min(count, config.limit)
    if count == 0:
        raise SourceError(
            f"No document is left after offset {config.offset} and limit {config.limit} of {len(source)}.",
            where=config.path,
            hint="Lower source.offset or raise source.limit.",
        )
    return Slice(source, config.offset, count)


def find_files(path: str, suffixes: Sequence[str]) -> list[Path]:
    """Return the files a path names, in order of their names: itself, a folder's, or a pattern's.

    Raises:
        SourceError: There is none.
        AccessError: It may not be read.
    """
    root = Path(path)
    try:
        if root.is_file():
            return [root]
        if root.is_dir():
            found = [file for file in sorted(root.rglob("*")) if file.is_file() and file.name.endswith(tuple(suffixes))]
        else:
            found = [Path(name) for name in sorted(glob.glob(path, recursive=True)) if Path(name).is_file()]
    except OSError as error:
        raise AccessError(f"The source cannot be read: {error.strerror}.", where=path) from error
    if not found:
        raise SourceError(
            "There is no such file."
            if not root.exists()
            else f"The folder has no file ending in {', '.join(suffixes)}.",
            where=path,
            hint="Check source.path; a relative path starts at the folder the command runs in.",
        )
    return found


def document_of(row: Mapping[str, Any], id: str, config: SourceConfig, where: str) -> Document:
    """Return the document in one record, by the config's field names.

    Raises:
        SourceError: None of the fields is there, or one has the wrong type.
    """
    if config.id_field is not None:
        if config.id_field not in row:
            raise SourceError(f"The record has no field {config.id_field!r} for its id.", where=where)
        id = str(row[config.id_field])
    if (ids := row.get(config.input_ids_field)) is not None:
        return Document(id, input_ids=[int(one) for one in _typed(ids, list, config.input_ids_field, where)])
    if (messages := row.get(config.messages_field)) is not None:
        for message in _typed(messages, list, config.messages_field, where):
            if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
                raise SourceError("A message has no role and content texts.", where=where)
        return Document(id, messages=[{"role": m["role"], "content": m["content"]} for m in messages])
    if (prompt := row.get(config.prompt_field)) is not None and row.get(config.completion_field) is not None:
        completion = row[config.completion_field]
        return Document(
            id,
            prompt=_typed(prompt, str, config.prompt_field, where),
            completion=_typed(completion, str, config.completion_field, where),
        )
    if (text := row.get(config.text_field)) is not None:
        return Document(id, text=_typed(text, str, config.text_field, where))
    raise SourceError(
        f"The record has none of the fields {config.text_field!r}, {config.messages_field!r}, "
        f"{config.prompt_field!r} with {config.completion_field!r}, {config.input_ids_field!r}.",
        where=where,
        hint=f"It has {', '.join(map(repr, row)) or 'no field'}; set source.text_field or another *_field.",
    )


def _typed(value: Any, kind: type, field: str, where: str) -> Any:
    if not isinstance(value, kind):
        raise SourceError(f"The field {field!r} holds {type(value).__name__}, not {kind.__name__}.", where=where)
    return value


def _guess(path: str) -> str:
    root = Path(path)
    if (root / "dataset_info.json").is_file() or (root / "dataset_dict.json").is_file():
        return "huggingface"
    local = root.exists() or path.endswith(tuple(SUFFIXES)) or bool(glob.glob(path, recursive=True))
    if not local and re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        return "huggingface"
    names = [file.name for file in find_files(path, tuple(SUFFIXES))]
    for suffix, kind in SUFFIXES.items():
        if names[0].endswith(suffix):
            return kind
    raise SourceError(
        f"The kind of {names[0]!r} cannot be told from its name.",
        where=path,
        hint=f"Set source.kind; known endings are {', '.join(SUFFIXES)}.",
    )
