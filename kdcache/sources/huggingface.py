"""`huggingface`: a data set of the `datasets` library, saved in a folder or by hub name."""

from pathlib import Path
from typing import Any

from kdcache.errors import AccessError, ConfigError, SourceError
from kdcache.sources import Document, SourceConfig, document_of


class HuggingFaceSource:
    """The rows of one split; ids are the split's name and the row number unless a field gives them."""

    def __init__(self, config: SourceConfig) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ConfigError(
                "Reading this source needs the package datasets.",
                where="source.kind",
                hint="Run: pip install 'kdcache[datasets]'",
            ) from error
        self._config = config
        try:
            if Path(config.path).is_dir():
                loaded = datasets.load_from_disk(config.path)
            else:
                loaded = datasets.load_dataset(config.path, config.name, split=config.split, revision=config.revision)
        except Exception as error:
            raise AccessError(
                f"The data set cannot be loaded: {error}.",
                where=config.path,
                hint="Check the name, the network and, for gated data, `hf auth login`.",
            ) from error
        if isinstance(loaded, dict):
            if config.split not in loaded:
                raise SourceError(
                    f"The data set has no split {config.split!r}.", where=config.path, hint=f"It has {list(loaded)}."
                )
            loaded = loaded[config.split]
        self._rows = loaded

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Name, split, revision and the library's own fingerprint of the rows."""
        return {
            "kind": "huggingface",
            "name": Path(self._config.path).name if Path(self._config.path).is_dir() else self._config.path,
            "configuration": self._config.name,
            "split": self._config.split,
            "revision": self._config.revision,
            "rows": len(self._rows),
            "fingerprint": self._rows._fingerprint,
        }

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < len(self._rows):
            raise IndexError(index)
        name = f"{self._config.split}:{index}"
        return document_of(self._rows[index], name, self._config, f"{self._config.path}, {name}")


plugin = HuggingFaceSource
