"""The keys of a capture; `source.path`, `teacher.model`, `teacher.dtype` and `targets.k` are enough."""

from typing import Any, Literal

from pydantic import Field, model_validator

from kdcache.augment import Views
from kdcache.config import Section
from kdcache.samples import SamplesConfig
from kdcache.sources import SourceConfig
from kdcache.taps import MAP
from kdcache.teachers import TeacherConfig


class HiddenConfig(Section):
    """One layer's features to keep.

    Attributes:
        layer: final (after the last norm), embedding, the number of a layer from 1, attentions.N for a map of the
            layers from 0 (the mean over its heads, with room for samples.max_length keys a position), or a submodule's
            path such as layers.20.self_attn.v_proj.
        dtype: bfloat16, float32, or int8 with one scale a channel and shard.
        keep: all positions; masked: only where the label counts, zero elsewhere; pooled: their mean, one a sample.
    """

    layer: str = "final"
    dtype: Literal["bfloat16", "float32", "int8"] = "bfloat16"
    keep: Literal["all", "masked", "pooled"] = "all"

    @model_validator(mode="before")
    @classmethod
    def _number_or_name(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("layer"), int):
            return {**value, "layer": str(value["layer"])}
        return {"layer": str(value)} if isinstance(value, str | int) else value

    @model_validator(mode="after")
    def _has_a_mean(self) -> "HiddenConfig":
        if self.layer.startswith(MAP) and self.keep == "pooled":
            raise ValueError("an attention map has no mean over positions: keep all or masked of it")
        return self


class TargetsConfig(Section):
    """What is kept of a teacher's row.

    Attributes:
        k: Largest logits kept.
        bytes_per_position: A budget of all columns but hidden features and draws; k is then the largest that fits,
            found by coding a few of the teacher's rows.
        logits: Codec of the kept logits: levels (whole steps), bits (exact), float16, bfloat16, float32, steps16 or
            steps8; default: as `store.preset` says.
        steps_per_nat: Of levels: the error is half a step, 0.4 % of a probability at T = 1 with 128.
        draws: Ids drawn from the tail, for unbiased tail sums; 0 for none.
        hidden: Layers whose features are kept.
        exact: Also keep the last hidden state and, once, the output layer: the whole distribution comes back.
        fused: Measure the tail in one pass made by torch.compile (a C++ compiler on a CPU, Triton on a GPU): faster,
            and equal up to rounding.
        on_invalid: What becomes of a position whose logits are NaN or infinite: error, or skip (masked and counted).
    """

    k: int = Field(default=64, ge=1)
    bytes_per_position: float | None = Field(default=None, gt=0)
    logits: Literal["levels", "bits", "float16", "bfloat16", "float32", "steps16", "steps8"] | None = None
    steps_per_nat: int = Field(default=128, ge=1, le=4096)
    draws: int = Field(default=0, ge=0)
    hidden: tuple[HiddenConfig, ...] = ()
    exact: bool = False
    fused: bool = False
    on_invalid: Literal["error", "skip"] = "error"


class StoreConfig(Section):
    """How the store is cut.

    Attributes:
        preset: compact (ranked ids, logits in whole steps), lossless (ranked ids, logits to the last bit), or raw
            (nothing is compressed: the largest and the fastest to read).
        shard_positions: Positions a shard has room for; what at most is lost when a capture is killed.
        chunk_positions: Positions compressed together.
    """

    preset: Literal["compact", "lossless", "raw"] = "compact"
    shard_positions: int = Field(default=65536, ge=1)
    chunk_positions: int = Field(default=4096, ge=1)

    def rows(self, positions: int) -> tuple[int, int]:
        """Return the rows of a shard and of a chunk, in a store of so many positions.

        What a shard has room for is written, filled or not: an only shard that would not be full is as small as its
        positions, to the next whole chunk of like size.
        """
        shard, chunk = self.shard_positions, min(self.chunk_positions, self.shard_positions)
        if positions >= shard or shard % chunk:
            return shard, chunk
        chunks = -(-positions // chunk)
        chunk = -(-positions // chunks)
        return chunks * chunk, chunk


class LicencesConfig(Section):
    """Under which terms the store may be shared; recorded, not interpreted.

    Attributes:
        teacher: Licence of the teacher.
        data: Licence of the data.
    """

    teacher: str | None = None
    data: str | None = None


class FeatureConfig(Section):
    """One feature of a classifier to keep.

    Attributes:
        name: In the store.
        tap: Where it is read in the model, such as `hidden_states.2|first`; see kdcache/taps.py. Default: the name.
        dtype: bfloat16, float32, or int8 with one scale a channel and shard.
    """

    name: str
    tap: str | None = None
    dtype: Literal["bfloat16", "float32", "int8"] = "bfloat16"


class ExamplesConfig(Section):
    """Examples in place of text: a folder of arrays, and what the model is given of them.

    Attributes:
        path: Folder of `.npy` files; see kdcache/examples.py.
        fields: Parameter of the model to field; default: every field but the label, by its own name.
        batch_size: Samples of a forward pass.
        features: Kept of every sample.
        augment: Views of each sample, of a kind: image, tokens or copies; see kdcache/augment. Default: the examples as
            they are.
    """

    path: str
    fields: dict[str, str] = Field(default_factory=dict)
    batch_size: int = Field(default=64, ge=1)
    features: tuple[FeatureConfig, ...] = ()
    augment: Views | None = None


class CaptureConfig(Section):
    """One run of a teacher over a source, or of a classifier over examples."""

    source: SourceConfig | None = None
    examples: ExamplesConfig | None = None
    teacher: TeacherConfig
    samples: SamplesConfig = SamplesConfig()
    targets: TargetsConfig = TargetsConfig()
    store: StoreConfig = StoreConfig()
    licences: LicencesConfig = LicencesConfig()
    seed: int = 0

    @model_validator(mode="after")
    def _one_of_two(self) -> "CaptureConfig":
        if (self.source is None) == (self.examples is None):
            raise ValueError("give one of source and examples")
        return self
