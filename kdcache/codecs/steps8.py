"""`steps8`: sorted logits as 8-bit gaps with error feedback, one step a row.

With r_0 the row's maximum, gap i is the whole number round((r_{i-1} - z_i) / s) and r_i = r_{i-1} - gap * s, so
rounding errors do not add up. The row's largest gap, a cliff behind its few good candidates, is kept apart in half
precision with its place; s is the larger of 1/128 and the largest other gap / 254.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kdcache.codecs import Array, Part, Parts, require_finite


@dataclass(frozen=True, slots=True)
class Steps8:
    """Store logits [N, K], descending, with an absolute error of half a row's step (1/256 nat and up)."""

    name: ClassVar[str] = "steps8"

    @property
    def dtype(self) -> str:
        return "float32"

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        if shape[0] < 2:
            raise ValueError("the codec 'steps8' needs at least 2 entries a row")
        return {
            "": Part("uint8", (shape[0] - 1,)),
            "max": Part("float32", (), compressor="shuffle"),
            "gap": Part("float16", (), compressor="shuffle"),
            "place": Part("uint16", (), compressor="shuffle"),
            "step": Part("float16", (), compressor="shuffle"),
        }

    def encode(self, values: Array) -> Parts:
        require_finite(values, self.name)
        logits = values.astype(np.float64)
        gaps = logits[:, :-1] - logits[:, 1:]
        if (gaps < 0).any():
            raise ValueError("the codec 'steps8' needs logits in descending order")
        rows = np.arange(len(logits))
        place = gaps.argmax(axis=1)
        largest = gaps[rows, place]
        if len(gaps) and largest.max() > 65504:
            raise ValueError("a gap is beyond float16")
        gap = largest.astype(np.float16)
        gaps[rows, place] = 0.0
        step = np.maximum(1 / 128, gaps.max(axis=1, initial=0.0) / 254)
        # rounded up, so that the largest other gap still fits 255 steps
        step = np.nextafter(step.astype(np.float16), np.float16(np.inf))
        quanta = step.astype(np.float64)
        top = logits[:, 0].astype(np.float32)
        reached = top.astype(np.float64)
        codes = np.zeros((len(logits), logits.shape[1] - 1), dtype=np.uint8)
        for entry in range(logits.shape[1] - 1):
            reached = reached - np.where(place == entry, gap.astype(np.float64), 0.0)
            code = np.rint((reached - logits[:, entry + 1]) / quanta).clip(0, 255)
            reached = reached - code * quanta
            codes[:, entry] = code
        return {"": codes, "max": top, "gap": gap, "place": place.astype(np.uint16), "step": step}

    def decode(self, parts: Parts) -> Array:
        below = np.cumsum(parts[""], axis=1, dtype=np.int32) * parts["step"].astype(np.float32)[:, None]
        beyond = np.arange(below.shape[1]) >= parts["place"][:, None]
        below = below + np.where(beyond, parts["gap"].astype(np.float32)[:, None], np.float32(0))
        return np.column_stack([parts["max"], parts["max"][:, None] - below]).astype(np.float32)


plugin = Steps8
