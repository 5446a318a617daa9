"""Answers on disk: lines appended chunk by chunk, and a record beside them from which a killed run goes on.

While answers are lacking they stand in `NAME.part`; the file of the name itself is always whole. `NAME.json` is the
record: what was asked of whom, and how much of the lines is durable. One process writes a file at a time.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kdcache.errors import CorruptObjectError, MismatchError, SourceError
from kdcache.fingerprint import canonical_json, digest_json
from kdcache.store import disk


@dataclass(slots=True)
class Tally:
    """What has been counted so far.

    Attributes:
        prompts: Asked, templates multiplied out.
        answers: Kept.
        dropped: Reason to count.
        tokens: Made by the model, those of dropped answers and of ends among them.
        cut: Answers that spent max_new_tokens.
        other_tokens: Answers that are other tokens when read again with their prompt.
        seconds: Of the model.
    """

    prompts: int = 0
    answers: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    cut: int = 0
    other_tokens: int = 0
    seconds: float = 0.0


class AnswerFile:
    """A file of answers being written, or written.

    Attributes:
        complete: Whether all answers are there.
        chunks: That are durable.
        tally: Of these.
    """

    def __init__(self, path: Path, identity: dict[str, Any], asked: dict[str, Any]) -> None:
        self._path = path
        self._part = path.with_name(f"{path.name}.part")
        self._identity = identity
        self._asked = asked
        self._bytes = 0
        self.complete = False
        self.chunks = 0
        self.tally = Tally()

    @classmethod
    def open(cls, path: Path, identity: dict[str, Any], asked: dict[str, Any]) -> "AnswerFile":
        """Return a new file, or one that was begun with the same identity.

        Args:
            path: Of the answers.
            identity: Everything that fixes their bytes, by name.
            asked: How the model was asked, for those who will ask another the same.

        Raises:
            MismatchError: It was begun with another identity, or the file there is not ours.
            CorruptObjectError: Lines that were durable are gone.
        """
        file = cls(path, identity, asked)
        sidecar = record_of(path)
        if not sidecar.is_file():
            if path.exists():
                raise MismatchError(
                    "There is a file already, and no record says what it holds.",
                    where=str(path),
                    hint="Remove it, or choose another with --out.",
                )
            return file
        record = read_record(path)
        if record["identity"] != digest_json(identity):
            parts = {name: digest_json(value) for name, value in identity.items()}
            changed = [name for name, digest in parts.items() if record["parts"].get(name) != digest]
            raise MismatchError(
                f"The answers there were begun with another {', '.join(changed)}.",
                where=str(path),
                hint="Choose another --out, or remove the file and its record.",
            )
        if record["complete"] and not path.is_file():
            return file  # someone took the answers away: they are made again
        file._bytes, file.chunks, file.tally = record["bytes"], record["chunks"], Tally(**record["tally"])
        file._require(path if path.is_file() else file._part)
        file.complete = record["complete"]
        return file

    def append(self, lines: Sequence[dict[str, Any]], tally: Tally) -> None:
        """Add a chunk's lines and make them durable; a killed call leaves the file as it was before.

        Args:
            lines: JSON objects.
            tally: Of all chunks with this one.
        """
        data = b"".join(canonical_json(one) + b"\n" for one in lines)
        with disk.storage_errors(self._path, len(data)):
            disk.make(self._path.parent)
            self._part.touch()
            with self._part.open("r+b") as file:
                file.truncate(self._bytes)  # what a killed call left behind
                file.seek(self._bytes)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        self._bytes, self.chunks, self.tally = self._bytes + len(data), self.chunks + 1, tally
        self._record()

    def finish(self) -> None:
        """Give the answers their name."""
        with disk.storage_errors(self._path):
            if self._part.is_file():
                disk.move(self._part, self._path)
                disk.sync(self._path.parent)
        self.complete = True
        self._record()

    def _require(self, path: Path) -> None:
        found = path.stat().st_size if path.is_file() else 0
        if found < self._bytes or (path == self._path and found > self._bytes):
            raise CorruptObjectError(
                f"The answers have {found:,} bytes; {self._bytes:,} were written.",
                where=str(path),
                hint="Remove them and their record, and run the command again.",
            )

    def _record(self) -> None:
        record = {
            "complete": self.complete,
            "identity": digest_json(self._identity),
            "parts": {name: digest_json(value) for name, value in self._identity.items()},
            "teacher": self._identity.get("teacher"),
            "asked": self._asked,
            "bytes": self._bytes,
            "chunks": self.chunks,
            "tally": asdict(self.tally),
        }
        sidecar = record_of(self._path)
        temporary = sidecar.with_name(f"{sidecar.name}.new")
        with disk.storage_errors(sidecar):
            disk.write(temporary, json.dumps(record, indent=2, sort_keys=True).encode() + b"\n")
            disk.move(temporary, sidecar)
            disk.sync(sidecar.parent)


def record_of(path: Path) -> Path:
    """Return where the record of a file of answers stands."""
    return path.with_name(f"{path.name}.json")


def read_record(path: Path) -> dict[str, Any]:
    """Return the record of a file of answers.

    Raises:
        SourceError: There is none.
        CorruptObjectError: It is not one.
    """
    sidecar = record_of(path)
    try:
        record = json.loads(sidecar.read_bytes())
    except OSError as error:
        raise SourceError(
            "The answers have no record.", where=str(sidecar), hint="Give the --out of `kdcache generate`."
        ) from error
    except ValueError as error:
        raise CorruptObjectError("The record is not JSON.", where=str(sidecar)) from error
    wanted = {"complete", "identity", "parts", "asked", "bytes", "chunks", "tally"}
    if not isinstance(record, dict) or not wanted <= set(record):
        raise CorruptObjectError("The record lacks keys.", where=str(sidecar))
    return record
