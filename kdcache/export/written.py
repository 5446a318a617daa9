"""What a format's file hands back: the contract between `kdcache.export.export` and a format."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kdcache.export.finished import Finished
from kdcache.export.result import Parity
from kdcache.export.trial import Run


@dataclass(frozen=True, slots=True)
class Written:
    """What a format has written.

    Attributes:
        made_by: What wrote it, such as the name of an exporter.
        run: Its forward pass, of the files as they were read back.
        parity: How far that is from the student in torch.
        notes: What a user has to know, in sentences.
    """

    made_by: str
    run: Run
    parity: Parity
    notes: tuple[str, ...] = ()


class Format(Protocol):
    """One format: `plugin` of a module of `kdcache.export`, or of an entry point of that group."""

    def __call__(self, student: Finished, folder: Path, /) -> Written:
        """Write the student's model files to an empty folder, read them back and compare.

        Raises:
            ConfigError: A package is missing.
            MismatchError: What was written does not say what the student says.
            UnsupportedError: The format cannot hold this student.
        """
        ...
