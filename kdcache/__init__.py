"""Run the teacher once, store what it knew, distil any number of students from the store.

The public names are loaded on first use, so that `import kdcache` costs milliseconds and no torch. What runs a stage
stands in the stage's module: `kdcache.capture.capture`, `kdcache.train.train`, `kdcache.evaluate.evaluate`,
`kdcache.verify.verify`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcache.errors import KdcacheError
    from kdcache.store import Store, StoreWriter, open_store
    from kdcache.stream import Loader
    from kdcache.targets import Targets

__version__ = "0.1.0"

_HOMES = {
    "KdcacheError": "kdcache.errors",
    "Loader": "kdcache.stream",
    "Store": "kdcache.store",
    "StoreWriter": "kdcache.store",
    "Targets": "kdcache.targets",
    "open_store": "kdcache.store",
}

__all__ = [
    "KdcacheError",
    "Loader",
    "Store",
    "StoreWriter",
    "Targets",
    "open_store",
]


def __getattr__(name: str) -> Any:
    """Return a public name, importing its module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kdcache' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
