"""`steps8`: sorted logits as 8-bit gaps with error feedback, one step a row.

With r_0 the row's maximum, gap i is the whole number round((r_{i-1} - z_i) / s) and r_i = r_{i-1} - gap * s, so
rounding errors do not add up. The first two gaps, often the largest by far, are kept apart in half precision; s is
the larger of 1/128 and the largest other gap / 254.
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
        if shape[0] < 4:
            raise ValueError("the codec 'steps8' needs at least 4 entries a row")
        return {
            "": Part("uint8", (shape[0] - 3,)),
            "max": Part("float32", (), compressor="shuffle"),
            "first": Part("float16", (2,), compressor="shuffle"),
            "step": Part("float16", (), compressor="shuffle"),
        }

    def encode(self, values: Array) -> Parts:
        require_finite(values, self.name)
        logits = values.astype(np.float64)
        gaps = logits[:, :-1] - logits[:, 1:]
        if (gaps < 0).any():
            raise ValueError("the codec 'steps8' needs logits in descending order")
        top = logits[:, 0].astype(np.float32)
        reached = top.astype(np.float64)
        first = np.zeros((len(logits), 2), dtype=np.float16)
        for entry in range(2):
            first[:, entry] = reached - logits[:, entry + 1]
            reached = reached - np.maximum(first[:, entry], 0).astype(np.float64)
        if not np.isfinite(first).all():
            raise ValueError("one of the first gaps is beyond float16")
        first = np.maximum(first, np.float16(0))
        step = np.maximum(1 / 128, gaps[:, 2:].max(axis=1, initial=0.0) / 254)
        # rounded up, so that the largest gap still fits 255 steps
        step = np.nextafter(step.astype(np.float16), np.float16(np.inf))
        quanta = step.astype(np.float64)
        codes = np.zeros((len(logits), logits.shape[1] - 3), dtype=np.uint8)
        for entry in range(codes.shape[1]):
            code = np.rint((reached - logits[:, entry + 3]) / quanta).clip(0, 255)
            reached = reached - code * quanta
            codes[:, entry] = code
        return {"": codes, "max": top, "first": first, "step": step}

    def decode(self, parts: Parts) -> Array:
        second = parts["max"] - parts["first"][:, 0].astype(np.float32)
        third = second - parts["first"][:, 1].astype(np.float32)
        below = np.cumsum(parts[""], axis=1, dtype=np.int32) * parts["step"].astype(np.float32)[:, None]
        return np.column_stack([parts["max"], second, third, third[:, None] - below]).astype(np.float32)


plugin = Steps8
