"""What every kind of views does.

Legend: `S` samples, `V` views, `P` numbers of a view.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

Read = Callable[[NDArray[np.int64], Sequence[str]], dict[str, Array]]
"""Places of samples and names of fields to arrays [S, ...], as `kdcache.examples.Examples.batch`."""


class Kind(Protocol):
    """A module of this package; its config is a Section with `views`, the number V.

    Attributes:
        VERSION: Changes when the same config and ids would give other views.
        NUMBERS: P.
        SAID: What the numbers are.
    """

    VERSION: int
    NUMBERS: int
    SAID: str

    def touched(self, config: Any) -> tuple[str, ...]:
        """Return the fields that a view changes."""

    def aligned(self, config: Any) -> bool:
        """Say whether what has a value for each token, or each place, still fits a view."""

    def plain(self, count: int) -> NDArray[np.float32]:
        """Return the numbers [count, P] of samples as they are; of copies, the first."""

    def draw(self, config: Any, ids: Sequence[str], places: Array, count: int) -> NDArray[np.float32]:
        """Return the numbers [S, V, P] of every view of some samples: of (config, id, view) alone."""

    def view(self, config: Any, numbers: Array, places: NDArray[np.int64], read: Read) -> dict[str, Array]:
        """Return the changed fields of one view of some samples, by field; the same bits each time."""
