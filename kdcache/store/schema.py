"""What a store holds: its columns, and the plan that fixes every number in it.

Legend: `N` positions, `K` kept entries, `M` tail draws, `D` hidden width, `V` vocabulary.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.codecs import Codec, Part, codec, parameters
from kdcache.codecs.integer import narrowest
from kdcache.errors import ConfigError
from kdcache.fingerprint import digest_bytes
from kdcache.targets.log_partition import AT_ONE, NODES

ALIGNMENT = {
    "causal_lm": "row t is the teacher's distribution of token t+1 given tokens 0..t; L tokens give exactly L-1 rows",
    "classifier": "one row for each label of a sample and each of its views: the teacher's distribution of that label",
}

AT_ONE_ONLY = "partial_targets"
"""Feature a reader must know of where the tail is known at T = 1 only, and a label's logit may be NaN: not told."""

RANKED = "ranked"
"""The codec whose values are ranks in the store's ranking, not ids."""

MASKED, COUNTS, INVALID = 0, 1, 2
"""Values of the column `loss_mask`: the label does not count, counts, or the teacher's row was not finite."""

HEAD_CHUNK_ROWS = 4096
"""Rows of a chunk of the output head's weight."""

MAX_SHARD_BYTES = 8 << 30
"""Of a decoded shard, all columns together: what a reader may be made to hold."""


@dataclass(frozen=True, slots=True)
class Column:
    """A per-position column.

    Attributes:
        name: As in `columns/<name>`.
        codec: Name of its codec.
        parameters: The codec's JSON parameters.
        shape: Of a decoded row.
        unit: Of the decoded values.
        description: One sentence for a stranger.
        compressed: Whether its arrays are compressed as the codec says, or not at all.
    """

    name: str
    codec: str
    parameters: dict[str, Any]
    shape: tuple[int, ...]
    unit: str
    description: str
    compressed: bool = True

    def build(self) -> Codec:
        """Return the column's codec."""
        return codec(self.codec, self.parameters)

    def arrays(self) -> dict[str, tuple[str, Part]]:
        """Return, for each part of the codec, the path of its array and what it holds."""
        parts = self.build().parts(self.shape)
        if not self.compressed:
            parts = {name: replace(part, compressor="none") for name, part in parts.items()}
        return {name: (f"columns/{self.name}{'.' if name else ''}{name}", part) for name, part in parts.items()}

    def as_json(self) -> dict[str, Any]:
        """Return the column's entry in the manifest, spelled out for a reader without kdcache."""
        arrays = [
            {
                "part": name,
                "array": path,
                "dtype": part.dtype,
                "shape": list(part.shape),
                "per": part.per,
                "compressor": part.compressor,
            }
            for name, (path, part) in self.arrays().items()
        ]
        own = {**asdict(self), "shape": list(self.shape), "dtype": self.build().dtype}
        if self.compressed:
            del own["compressed"]  # format 1.0 has no such member
        return {**own, "arrays": arrays}


@dataclass(frozen=True, slots=True)
class OutputHead:
    """A teacher's output layer: logits = softcap(scale * (hidden @ weight.T + bias)).

    Attributes:
        weight: float32 [V, D].
        bias: float32 [V], or None.
        scale: Factor on the logits.
        softcap: c in c * tanh(logits / c), or None.
        codec: How the arrays are kept: "bfloat16" or "float32".
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None = None
    scale: float = 1.0
    softcap: float | None = None
    codec: str = "float32"


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """The run of whole samples that one shard holds."""

    first_sample: int
    samples: int
    rows: int


def decoded_bytes(columns: Sequence[Column]) -> int:
    """Return the bytes of a decoded row of some columns; Python's numbers do not overflow."""
    return sum(math.prod(one.shape, start=np.dtype(one.build().dtype).itemsize) for one in columns)


def features_of(columns: Sequence[Column]) -> list[str]:
    """Return what a reader of a store with these columns must know of."""
    tail = next((one for one in columns if one.name == "tail_log_partition"), None)
    return [AT_ONE_ONLY] if tail is not None and tail.shape == (len(AT_ONE),) else []


def plan_shards(rows: NDArray[Any], room: int) -> Iterator[ShardPlan]:
    """Yield the shards that hold samples of these many rows in order, none straddling.

    Raises:
        ConfigError: A sample has more rows than a shard has room for.
    """
    if len(rows) and int(rows.max()) > room:
        raise ConfigError(
            f"A sample has {int(rows.max())} positions, and a shard has room for {room}.",
            where="store.shard_positions",
            hint="Raise store.shard_positions, or lower samples.max_length.",
        )
    first, held = 0, 0
    for number, count in enumerate(rows.tolist()):
        if held + count > room:
            yield ShardPlan(first, number - first, held)
            first, held = number, 0
        held += count
    yield ShardPlan(first, len(rows) - first, held)


@dataclass(frozen=True, slots=True)
class StorePlan:
    """Everything that fixes the content of a store; equal plans give equal digests.

    Attributes:
        kind: "causal_lm" or "classifier".
        columns: What is kept a position.
        shard_rows: Positions a shard has room for.
        chunk_rows: Positions compressed together; divides `shard_rows`.
        vocab_size: V, the length of the teacher's row.
        k: Entries kept.
        teacher: Fingerprint of the teacher.
        tokenizer: Fingerprint of the tokenizer, or None.
        source: Fingerprint of the source and of the samples made from it.
        capture: The settings of the capture that fix its numbers.
        licences: Of teacher and data.
        skipped: Documents and samples left out, by reason.
        shards: In order; they tile the samples.
        tokenizer_files: Name and content of what reloads the tokenizer.
        output_head: The teacher's output layer, kept by `exact` captures.
        ranking: int32 [V], ids by rank, where a column is kept as ranks.
    """

    kind: str
    columns: tuple[Column, ...]
    shard_rows: int
    chunk_rows: int
    vocab_size: int
    k: int
    teacher: dict[str, Any]
    tokenizer: dict[str, Any] | None
    source: dict[str, Any]
    capture: dict[str, Any]
    licences: dict[str, Any]
    skipped: dict[str, int]
    shards: tuple[ShardPlan, ...]
    tokenizer_files: Mapping[str, bytes] = field(default_factory=dict)
    output_head: OutputHead | None = None
    ranking: NDArray[np.int32] | None = None

    def __post_init__(self) -> None:
        if self.chunk_rows < 1 or self.shard_rows % self.chunk_rows:
            raise ConfigError(
                f"A shard of {self.shard_rows} positions is not a whole number of chunks of {self.chunk_rows}.",
                where="store.shard_positions",
                hint="Make shard_positions a multiple of chunk_positions.",
            )
        if not 1 <= self.k <= self.vocab_size:
            raise ConfigError(f"k = {self.k} is not in 1 to the vocabulary of {self.vocab_size}.", where="targets.k")
        if (decoded := decoded_bytes(self.columns) * self.shard_rows) > MAX_SHARD_BYTES:
            raise ConfigError(
                f"A shard would have {decoded:,} bytes when decoded; {MAX_SHARD_BYTES:,} are allowed.",
                where="store.shard_positions",
                hint="Lower store.shard_positions: readers hold several shards at once.",
            )
        if any(column.codec == RANKED for column in self.columns) != (self.ranking is not None):
            raise ConfigError("Columns kept as ranks need a ranking, and others none.", where="store.preset")

    def as_json(self) -> dict[str, Any]:
        """Return the plan without its large arrays, as `plan.json` keeps it."""
        head = self.output_head
        return {
            "kind": self.kind,
            "columns": [column.as_json() for column in self.columns],
            "shard_rows": self.shard_rows,
            "chunk_rows": self.chunk_rows,
            "vocab_size": self.vocab_size,
            "k": self.k,
            "teacher": self.teacher,
            "tokenizer": self.tokenizer,
            "source": self.source,
            "capture": self.capture,
            "licences": self.licences,
            "skipped": self.skipped,
            "shards": [[shard.first_sample, shard.samples, shard.rows] for shard in self.shards],
            "output_head": None
            if head is None
            else {
                "shape": list(head.weight.shape),
                "bias": head.bias is not None,
                "scale": head.scale,
                "softcap": head.softcap,
                "codec": head.codec,
            },
            **({} if self.ranking is None else {"ranking": digest_bytes(self.ranking.astype("<i4").tobytes())}),
        }


@dataclass(frozen=True, slots=True)
class HiddenSpec:
    """One layer's features to keep: its name, the width or shape of a row, and codec."""

    layer: str
    width: int | tuple[int, ...]
    codec: str = "bfloat16"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a row."""
        return (self.width,) if isinstance(self.width, int) else self.width


@dataclass(frozen=True, slots=True)
class Kept:
    """With which codecs a store keeps a head.

    Attributes:
        logits: Codec of the kept logits.
        parameters: Its parameters.
        ranked: Ids are kept as ranks in the store's ranking.
        differences: Of the codec `log_partition`.
        compressed: False leaves every array as it is, for the fastest reading.
        any_temperature: False where the tail is known at T = 1 only.
    """

    logits: str = "steps16"
    parameters: dict[str, Any] = field(default_factory=dict)
    ranked: bool = False
    differences: int = 0
    compressed: bool = True
    any_temperature: bool = True


def standard_columns(
    *,
    k: int,
    vocab_size: int,
    kept: Kept | None = None,
    draws: int = 0,
    hidden: Sequence[HiddenSpec] = (),
    inputs: bool = True,
) -> tuple[Column, ...]:
    """Return the columns of a causal-LM store, or without inputs those of a classifier's.

    Args:
        k: Entries kept.
        vocab_size: Ids are 0 to V - 1.
        kept: How.
        draws: Tail draws a position; 0 for none.
        hidden: Layers whose features are kept at every position.
        inputs: Keep the token at the position; a classifier's inputs stay in its examples.

    Raises:
        ConfigError: A codec does not fit what it is asked to keep.
    """
    kept = kept or Kept()
    ids = parameters(narrowest(vocab_size))
    head_ids = (RANKED, {"vocab_size": vocab_size}) if kept.ranked else ("integer", ids)
    nodes = NODES if kept.any_temperature else AT_ONE
    tail = {"differences": kept.differences} if kept.differences and kept.any_temperature else {}
    described = [
        ("input_ids", "integer", ids, (), "id", "token at the position: what the model sees"),
        ("labels", "integer", ids, (), "id", "the next token: what is predicted"),
        ("loss_mask", "integer", {"bits": 8}, (), "flag", "0 masked, 1 counts, 2 the teacher's row was not finite"),
        ("head_ids", *head_ids, (k,), "id", "ids of the k largest logits, descending"),
        (
            "head_logits",
            kept.logits,
            kept.parameters,
            (k,),
            "nat",
            "raw logits of head_ids: no temperature, not normalised",
        ),
        (
            "tail_log_partition",
            "log_partition",
            tail,
            (len(nodes),),
            "nat",
            f"log-sum-exp of b*z over the tail minus b*head_logits[-1], at b = {', '.join(map(str, nodes))}",
        ),
        ("label_logit", "float32", {}, (), "nat", "raw logit of the label, in the head or not"),
    ]
    if draws:
        described += [
            ("draw_ids", "integer", ids, (draws,), "id", "ids drawn from the tail with replacement"),
            ("draw_logits", "float16", {}, (draws,), "nat", "raw logits of draw_ids"),
        ]
    for spec in hidden:
        described.append(
            (f"hidden.{spec.layer}", spec.codec, {}, spec.shape, "1", f"hidden state of layer {spec.layer}")
        )
    columns = tuple(replace(Column(*one), compressed=kept.compressed) for one in described[0 if inputs else 1 :])
    for column in columns:
        try:
            column.arrays()
        except ValueError as error:
            raise ConfigError(f"The column {column.name} cannot be kept: {error}.", where="targets") from error
    return columns
