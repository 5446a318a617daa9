"""Stores from and to what other tools keep: one file a format, and what each of them loses is said aloud.

Legend: `S` samples, `L` tokens of a sample, `K` kept entries.

    distillkit   arcee-ai/DistillKit: Parquet with bit-packed ids and polynomially compressed log-probabilities
    axolotl      axolotl's JSON Lines, a list of log-probabilities a token
    parquet      plain Parquet, one row a sample; the only one that loses nothing of the targets
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from kdcache import registry
from kdcache.errors import ConfigError, MismatchError, SourceError
from kdcache.fingerprint import canonical_json
from kdcache.store import Store, open_store
from kdcache.store.disk import storage_errors
from kdcache.store.told import Told

FORMATS = ("axolotl", "distillkit", "parquet")

MARK = "kdcache.json"
"""Beside what was written: which store it is of."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Reading:
    """How foreign files are read; what does not concern a format is ignored by it.

    Attributes:
        vocab_size: V of the teacher, where the files do not say it.
        tokenizer: Folder or hub name of the teacher's tokenizer; also goes into the store.
        top: Entries to keep; default: as many as most positions have.
        pad_id: Padding at the end of a sample, whose label does not count.
        field: Of the log-probabilities in JSON Lines.
    """

    vocab_size: int | None = None
    tokenizer: str | None = None
    top: int | None = None
    pad_id: int | None = None
    field: str = "logprobs"


@dataclass(frozen=True, slots=True)
class Source:
    """Foreign files, opened.

    Attributes:
        samples: Gives an iterator over all of them, in one order, as often as it is called.
        count: S.
        vocab_size: V, or None where the files do not say it.
        kind: What the log-probabilities are exact in: float32, bfloat16 or float16.
        files: What was read, for the fingerprint.
        lost: What a store made of them lacks, in sentences.
    """

    samples: Callable[[], Iterator[Told]]
    count: int
    vocab_size: int | None
    kind: str
    files: tuple[Path, ...]
    lost: tuple[str, ...] = ()


class Format(Protocol):
    """One foreign format."""

    def read(self, path: Path, reading: Reading) -> Source:
        """Return what lies in a file or folder, opened and not yet read.

        Raises:
            SourceError: It is not there, or not of the format.
        """
        ...

    def write(self, store: Store, index: int, path: Path) -> None:
        """Write the samples of a shard to a new file."""
        ...

    def begin(self, store: Store, folder: Path) -> None:
        """Write what comes before the first shard."""
        ...

    @property
    def suffix(self) -> str:
        """Of a shard's file."""
        ...

    def lost(self, store: Store) -> list[str]:
        """Return what the format cannot keep of a store, in sentences."""
        ...


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written.

    Attributes:
        samples: How many.
        positions: How many.
        files: How many, of a foreign format.
        digest: Of the new store, or of the one that was read.
        lost: What did not come along, in sentences.
        counts: Positions that were changed or left out, by reason.
    """

    samples: int
    positions: int
    files: int
    digest: str
    lost: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return asdict(self)


def find(name: str) -> Format:
    """Return the format of that name.

    Raises:
        ConfigError: There is none.
    """
    if name not in FORMATS:
        raise ConfigError(f"There is no format {name!r}.", where="--from, --to", hint=f"Choose of {list(FORMATS)}.")
    found: Format = registry.find(__name__, name)()
    return found


def export(store: Store | Path | str, out: Path | str, name: str, *, progress: Progress | None = None) -> Converted:
    """Write a store in a foreign format, a file a shard; the same call goes on with what is not there yet.

    Args:
        store: An open store, its folder or URL.
        out: Folder of the files.
        name: Of the format.
        progress: Called with positions done and all.

    Raises:
        ConfigError: There is no such format.
        MismatchError: The folder holds something else.
        StorageFullError: The same call goes on.
    """
    form, opened, root = find(name), store if isinstance(store, Store) else open_store(store), Path(out)
    mark = canonical_json({"format": name, "store": opened.digest})
    if root.is_dir() and any(root.iterdir()) and (root / MARK).is_file() and (root / MARK).read_bytes() != mark:
        raise MismatchError("The folder holds what was made of another store.", where=str(root), hint="Choose another.")
    if root.exists() and (not root.is_dir() or (any(root.iterdir()) and not (root / MARK).is_file())):
        raise MismatchError("This is not an empty folder.", where=str(root), hint="Choose another --out.")
    with storage_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        (root / MARK).write_bytes(mark)
        form.begin(opened, root)
        done = 0
        for index, shard in enumerate(opened.shards):
            path = root / f"data_{index:05d}{form.suffix}"
            if not path.is_file():
                draft = path.with_name(f".{path.name}")
                form.write(opened, index, draft)
                draft.replace(path)
            done += shard.rows
            if progress:
                progress(done, opened.num_positions)
    return Converted(len(opened), done, len(opened.shards), opened.digest, form.lost(opened))


def files_in(path: Path, suffix: str) -> tuple[Path, ...]:
    """Return a file, or those of a folder with a suffix, in the order of their names.

    Raises:
        SourceError: There is none.
    """
    found = (path,) if path.is_file() else tuple(sorted(path.glob(f"*{suffix}")))
    if not found:
        raise SourceError(f"There is no {suffix} file here.", where=str(path), hint="Give the file, or its folder.")
    return found


__all__ = ["FORMATS", "Converted", "Format", "Reading", "Source", "export", "files_in", "find"]
