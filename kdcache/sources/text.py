"""`text`: plain UTF-8 files; a document is a file, a line or a paragraph."""

import re
from pathlib import Path
from typing import Any

from kdcache.errors import AccessError, SourceError
from kdcache.fingerprint import digest_bytes
from kdcache.sources import Document, SourceConfig, find_files


class TextSource:
    """The non-empty documents of one or more text files; ids are file name and number."""

    def __init__(self, config: SourceConfig) -> None:
        self._documents: list[Document] = []
        self._files = []
        for file in find_files(config.path, (".txt", ".md")):
            data = _read(file)
            self._files.append([file.name, digest_bytes(data)])
            for number, text in enumerate(_split(_decode(data, file), config.documents)):
                if text.strip():
                    name = file.name if config.documents == "file" else f"{file.name}:{number}"
                    self._documents.append(Document(name, text=text))
        self._options = {"documents": config.documents}
        if len({document.id for document in self._documents}) != len(self._documents):
            raise SourceError("Two files have the same name, so their documents would share ids.", where=config.path)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Names and digests of the files, and how they are cut."""
        return {"kind": "text", "files": self._files, **self._options}

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> Document:
        return self._documents[index]


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise AccessError(f"The file cannot be read: {error.strerror}.", where=str(file)) from error


def _decode(data: bytes, file: Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(
            f"The file is not UTF-8 text: byte {error.start}.", where=str(file), hint="Convert it to UTF-8 first."
        ) from error


def _split(text: str, documents: str) -> list[str]:
    if documents == "file":
        return [text]
    if documents == "line":
        return text.splitlines()
    return re.split(r"\n[ \t]*\n+", text)


plugin = TextSource
