"""Every error kdcache raises on purpose: what happened, where, and what to do next.

The tree (codes are never reused; exit codes are those of the command line):

    KdcacheError                         1   unexpected
    ├── UsageError                KD100  2   the request cannot be carried out as written
    │   ├── ConfigError           KD101  2   unknown key, wrong type, options that exclude each other
    │   ├── SourceError           KD102  2   data missing, unreadable, empty, or changed since the start
    │   └── SampleError           KD103  2   a sample is too long, empty, or has an id outside the vocabulary
    ├── DamageError               KD200  3   a store or checkpoint is not what its manifest says
    │   ├── IncompleteStoreError  KD201  3   there is no manifest: the capture has not finished
    │   ├── CorruptObjectError    KD202  3   an object's length, digest or content is wrong
    │   └── MissingObjectError    KD203  3   an object that the manifest names is absent
    ├── RefusedError              KD300  4   readable, but must not be used
    │   ├── UnsupportedError      KD301  4   a format version, feature or codec this release does not know
    │   ├── UnsafeError           KD302  4   a path, size or type that a stranger's store may not have
    │   └── MismatchError         KD303  4   teacher, tokenizer, vocabulary, source or config differ
    ├── AccessError               KD400  5   permission or network
    │   └── OutageError           KD401  75  a place did not answer for longer than it is waited for; try again later
    ├── StorageFullError          KD500  6   no space left; nothing committed is lost
    ├── TeacherError              KD600  7   the teacher failed
    │   ├── TeacherNumericsError  KD601  7   NaN or infinite logits
    │   └── TeacherMemoryError    KD602  7   out of memory even at one sample
    ├── TrainingError             KD700  1   the student's loss is not finite, or a metric cannot be computed
    └── Interrupted               KD750  75  stopped on request; the same command goes on from here
"""

from typing import ClassVar


class KdcacheError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: One sentence saying what happened.
        where: Path, shard, row, key or sample it happened at.
        hint: What to do next, ideally a command.
    """

    code: ClassVar[str] = "KD000"
    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.code}: {self.what}"
        if self.where:
            text += f"\n  where: {self.where}"
        if self.hint:
            text += f"\n  next:  {self.hint}"
        return text

    def as_dict(self) -> dict[str, str | int]:
        """Return the error as a JSON-ready object, the form `--json` prints."""
        return {
            "error": type(self).__name__,
            "code": self.code,
            "exit_code": self.exit_code,
            "what": self.what,
            "where": self.where,
            "next": self.hint,
        }


class UsageError(KdcacheError):
    """The request cannot be carried out as written."""

    code = "KD100"
    exit_code = 2


class ConfigError(UsageError):
    """Unknown key, wrong type, or options that exclude each other."""

    code = "KD101"


class SourceError(UsageError):
    """Data are missing, unreadable, empty, or changed since the capture began."""

    code = "KD102"


class SampleError(UsageError):
    """A sample is too long, empty, or has an id outside the vocabulary."""

    code = "KD103"


class DamageError(KdcacheError):
    """A store or checkpoint is not what its manifest says."""

    code = "KD200"
    exit_code = 3


class IncompleteStoreError(DamageError):
    """There is no manifest: the capture has not finished."""

    code = "KD201"


class CorruptObjectError(DamageError):
    """An object's length, digest or content is wrong."""

    code = "KD202"


class MissingObjectError(DamageError):
    """An object that the manifest names is absent."""

    code = "KD203"


class RefusedError(KdcacheError):
    """Readable, but must not be used."""

    code = "KD300"
    exit_code = 4


class UnsupportedError(RefusedError):
    """A format version, feature or codec that this release does not know."""

    code = "KD301"


class UnsafeError(RefusedError):
    """A path, size or type that a stranger's store may not have."""

    code = "KD302"


class MismatchError(RefusedError):
    """Teacher, tokenizer, vocabulary, source or config differ from what was recorded."""

    code = "KD303"


class AccessError(KdcacheError):
    """Permission or network."""

    code = "KD400"
    exit_code = 5


class OutageError(AccessError):
    """A place did not answer for longer than it is waited for; the same command goes on once it does."""

    code = "KD401"
    exit_code = 75


class StorageFullError(KdcacheError):
    """No space left on the device; nothing that was committed is lost."""

    code = "KD500"
    exit_code = 6


class TeacherError(KdcacheError):
    """The teacher failed."""

    code = "KD600"
    exit_code = 7


class TeacherNumericsError(TeacherError):
    """The teacher gave NaN or infinite logits."""

    code = "KD601"


class TeacherMemoryError(TeacherError):
    """The teacher ran out of memory even at one sample."""

    code = "KD602"


class TrainingError(KdcacheError):
    """The student's loss is not finite, or a metric cannot be computed."""

    code = "KD700"


class Interrupted(KdcacheError):
    """Stopped on request; the same command goes on from the last committed shard or checkpoint."""

    code = "KD750"
    exit_code = 75
