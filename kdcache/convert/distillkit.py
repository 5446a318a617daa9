"""DistillKit's offline captures: Parquet of bit-packed ids and compressed log-probabilities, and a YAML beside it.

Legend: `N` positions of a sample, `K` kept entries, `E` of them exact, `R` the others, `V` vocabulary.

The layout, from arcee-ai/DistillKit (`sample_common.py`, `compression/`, read in November 2026):

- `input_ids`; row t of the others is about token t + 1. Captures end samples with one padding token.
- `bytepacked_indices` [N, bytes]: K ids of ceil(log2 V) bits, the highest bit first, a row filled up to whole bytes.
- `compressed_logprobs` [N, bytes]: E exact values; coefficients of a least-squares fit of the other R over their place;
  bins of residuals, each a scale and integers of some bits. With `delta_encoding` all of them are of the differences.
- older captures: `packed_indices` (as many ids as fit a 64-bit integer, the lowest first), `exact_values`, `coeffs`.

What was written is read back as their reader does, up to the rounding of half-precision coefficients.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from kdcache.config import Section
from kdcache.convert import Reading, Source, files_in
from kdcache.convert.nested import columns_in, count_in, lists, rectangle, rows_of
from kdcache.convert.parquet import tokens_of, told
from kdcache.errors import SourceError, UnsupportedError
from kdcache.store import Store
from kdcache.store.told import Told

Array = NDArray[Any]

CONFIG = "compression_config.yaml"
WIDTH = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class Bin(Section):
    """Residuals of some neighbouring places."""

    scale_dtype: str
    element_bits: int = Field(ge=1, le=63)
    num_elements: int = Field(ge=1)


class Compression(Section):
    """`compression_config.yaml`."""

    d: int = Field(ge=1, le=1 << 24)
    k: int = Field(ge=1, le=1 << 16)
    exact_k: int = Field(ge=0)
    exact_dtype: str = "float32"
    polynomial_terms: list[int | str] | None = None
    term_dtype: str = "float32"
    residual_bins: tuple[Bin, ...] = ()
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False


class Legacy(Section):
    """The YAML of older captures."""

    k: int = Field(ge=1, le=1 << 16)
    exact_k: int = Field(ge=0)
    polynomial_degree: int = Field(ge=0, le=64)
    vocab_size: int = Field(ge=1, le=1 << 24)
    invert_polynomial: bool = True
    with_sqrt_term: bool = False
    term_dtype: str = "float32"


class DistillKit:
    """See the module."""

    suffix = ".parquet"

    def read(self, path: Path, reading: Reading) -> Source:
        """Return a capture; its YAML lies beside the files."""
        files = files_in(path, self.suffix)
        there = columns_in(files)
        config = _config(files[0].parent / CONFIG)
        old = isinstance(config, Legacy)
        wanted = ["input_ids", *(LEGACY if old else NEW)]
        if lacking := [name for name in wanted if name not in there]:
            raise SourceError(f"The files have no column {lacking[0]!r}.", where=str(path), hint="Try --from parquet.")

        def samples() -> Iterator[Told]:
            for place, row in rows_of(files, wanted):
                try:
                    ids, values = _decoded(row, config)
                except (ValueError, IndexError) as error:
                    raise SourceError(f"The row does not fit {CONFIG}: {error}.", where=place) from error
                yield told(place, row, ids, values, reading)

        exact = config.exact_k == config.k and isinstance(config, Compression) and not config.delta_encoding
        lost = ["The tail is known at T = 1 only; labels outside the head have no log-probability."]
        if not exact:
            lost.append(f"{config.k - config.exact_k} of {config.k} log-probabilities are from a fit, as captured.")
        kind = config.exact_dtype if exact and isinstance(config, Compression) else "float32"
        vocab_size = config.vocab_size if isinstance(config, Legacy) else config.d
        return Source(samples, count_in(files), vocab_size, kind if kind in KINDS else "float32", files, tuple(lost))

    def begin(self, store: Store, folder: Path) -> None:
        """Write the YAML: all K entries exact, in float32."""
        config = Compression(d=store.vocab_size, k=store.k, exact_k=store.k, delta_encoding=False)
        (folder / CONFIG).write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))

    def write(self, store: Store, index: int, path: Path) -> None:
        """Write a shard's samples."""
        shard = store.read_shard(index, ["input_ids", "labels", *_HEAD])
        targets, rows = shard.targets(), np.diff(shard.offsets).tolist()
        assert targets is not None  # their columns were asked for
        values = (targets.logits - targets.log_partition(1.0)[:, None]).astype("<f4")
        tokens = tokens_of(shard.columns, shard.offsets)
        table = {
            "input_ids": lists(np.concatenate(tokens).astype(np.uint64), [len(one) for one in tokens]),
            "compressed_logprobs": lists(values.view(np.uint8), rows).cast(_BYTES),
            "bytepacked_indices": lists(_packed(targets.ids, _bits(store.vocab_size)), rows).cast(_BYTES),
        }
        pq.write_table(pa.table(table), path, write_page_checksum=True, row_group_size=256)

    def lost(self, store: Store) -> list[str]:
        """Return what does not come along."""
        return [
            "The tail's log-partition stays behind: temperatures other than 1 are guesses there.",
            "Which labels count, labels' logits, sample ids, hidden features, draws and all fingerprints stay behind.",
        ]


KINDS = ("float32", "bfloat16", "float16")
NEW = ("compressed_logprobs", "bytepacked_indices")
LEGACY = ("packed_indices", "exact_values", "coeffs")
_HEAD = ("head_ids", "head_logits", "tail_log_partition", "label_logit")
_BYTES = pa.list_(pa.list_(pa.uint8()))


def _config(path: Path) -> "Compression | Legacy":
    try:
        document = yaml.safe_load(path.read_text())
        return Legacy(**document) if "polynomial_degree" in document else Compression(**document)
    except FileNotFoundError as error:
        raise SourceError(
            "There is no compression_config.yaml beside the files.",
            where=str(path),
            hint="It says how the values were compressed; copy it from the student's settings.",
        ) from error
    except (yaml.YAMLError, ValidationError, TypeError, OSError) as error:
        raise SourceError(f"The settings are not DistillKit's: {error}", where=str(path)) from error


def _decoded(row: Mapping[str, Any], config: "Compression | Legacy") -> tuple[Array, Array]:
    if isinstance(config, Legacy):
        words = rectangle(row["packed_indices"], "uint64", 0)
        exact = rectangle(row["exact_values"], "float32", -np.inf)
        coefficients = rectangle(row["coeffs"], "float32", 0)
        place = np.arange(config.k - config.exact_k, dtype=np.float64) + 1
        signs = [-power if config.invert_polynomial else power for power in range(config.polynomial_degree + 1)]
        terms = [place**power for power in signs] + ([np.sqrt(place)] if config.with_sqrt_term else [])
        fit = coefficients @ np.stack(terms, 1).astype(np.float32).T if len(place) else exact[:, :0]
        return _words(words, config.k, _bits(config.vocab_size)), np.concatenate([exact, fit], 1)
    ids = _unpacked(rectangle(row["bytepacked_indices"], "uint8", 0), config.k, _bits(config.d))
    return ids, _values(rectangle(row["compressed_logprobs"], "uint8", 0), config)


def _values(data: Array, config: Compression) -> Array:
    exact, rest = _taken(data, config.exact_k, config.exact_dtype)
    others = config.k - config.exact_k
    found = np.zeros((len(data), others), dtype=np.float64)
    if config.polynomial_terms:
        coefficients, rest = _taken(rest, len(config.polynomial_terms), config.term_dtype)
        found += coefficients @ _terms(config.polynomial_terms, others, normalised=config.normalize_t).T
    at = 0
    for one in config.residual_bins:
        scale, rest = _taken(rest, 1, one.scale_dtype)
        size = -(-one.element_bits * one.num_elements // 8)
        steps = _unpacked(rest[:, :size], one.num_elements, one.element_bits).astype(np.float64)
        rest = rest[:, size:]
        steps = 2 * steps - 1 if one.element_bits == 1 else steps - 2 ** (one.element_bits - 1)
        found[:, at : at + one.num_elements] += steps * scale
        at += one.num_elements
    values = np.concatenate([exact, found], 1)
    if config.delta_encoding:
        values = np.cumsum(values, axis=1)
    return values.astype(np.float32)


def _taken(data: Array, count: int, dtype: str) -> tuple[Array, Array]:
    """Return the first numbers of every row as float64, and the bytes after them."""
    if dtype not in WIDTH:
        raise UnsupportedError(f"The settings name a type {dtype!r}.", hint=f"Known are {sorted(WIDTH)}.")
    size = count * WIDTH[dtype]
    if data.shape[1] < size:
        raise ValueError(f"a position has {data.shape[1]} bytes left and needs {size}")
    part = np.ascontiguousarray(data[:, :size])
    if dtype == "bfloat16":
        values = (part.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = part.view({2: "<f2", 4: "<f4", 8: "<f8"}[WIDTH[dtype]])
    return values.astype(np.float64).reshape(len(data), count), data[:, size:]


def _terms(terms: list[int | str], count: int, *, normalised: bool) -> Array:
    place = np.linspace(0, 1, count) if normalised else np.arange(count, dtype=np.float64)
    special = {"sqrt": np.sqrt, "exp": np.exp}
    if unknown := [one for one in terms if isinstance(one, str) and one not in special]:
        raise UnsupportedError(f"The settings name a term {unknown[0]!r}.", hint="Known are powers, sqrt and exp.")
    columns = [special[one](place) if isinstance(one, str) else place**one for one in terms]
    return np.stack(columns, 1)


def _bits(vocab_size: int) -> int:
    return max(1, math.ceil(math.log2(vocab_size)))


def _unpacked(data: Array, count: int, bits: int) -> Array:
    """Return whole numbers of some bits each, the highest bit first."""
    if data.shape[1] * 8 < count * bits:
        raise ValueError(f"{count} numbers of {bits} bits do not fit {data.shape[1]} bytes")
    stream = np.unpackbits(np.ascontiguousarray(data), axis=1)[:, : count * bits].reshape(len(data), count, bits)
    found = np.zeros(stream.shape[:2], dtype=np.int64)
    for bit in range(bits):
        found = (found << 1) | stream[:, :, bit]
    return found


def _packed(ids: Array, bits: int) -> Array:
    places = np.arange(bits - 1, -1, -1)
    stream = ((ids.astype(np.int64)[:, :, None] >> places) & 1).astype(np.uint8)
    return np.packbits(stream.reshape(len(ids), -1), axis=1)


def _words(words: Array, count: int, bits: int) -> Array:
    """Return ids of 64-bit words, as many whole ones in each as fit, the lowest bits first."""
    fit = 64 // bits
    if words.shape[1] * fit < count:
        raise ValueError(f"{count} ids of {bits} bits do not fit {words.shape[1]} words")
    shifts = (np.arange(fit) * bits).astype(np.uint64)
    ids = (words[:, :, None] >> shifts) & np.uint64((1 << bits) - 1)
    return ids.reshape(len(words), -1)[:, :count].astype(np.int64)


plugin = DistillKit
