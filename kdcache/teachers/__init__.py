"""Frozen models: one file is one way to run one.

Legend: `S` samples, `N` positions of all of them, `D` hidden width, `V` vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from kdcache import registry
from kdcache.config import Section
from kdcache.errors import ConfigError
from kdcache.targets.tensor import OutputHead


class TeacherConfig(Section):
    """Which model, and how it runs.

    Attributes:
        model: Folder, hub name, GGUF file (or a folder holding one), or `module:attribute` for a callable or
            nn.Module; `module:attribute()` calls it first; or the URL of an OpenAI-compatible server, up to `/v1`.
        kind: transformers, callable, served, vllm, a plug-in's name; auto goes by `model`. Of examples: module, onnx,
            transformers, timm, torchvision, student, ensemble.
        dtype: Of the weights and of the forward pass; auto takes the checkpoint's.
        device: cpu, cuda, cuda:1, mps; auto takes the accelerator if there is one.
        compile: Run the model through torch.compile.
        gguf_file: Name of the GGUF file in the folder, where it holds several.
        revision: Of a hub model; the commit it resolves to is recorded.
        tokenizer: Folder or hub name; default: the model's own.
        trust_remote_code: Run code that comes with the model.
        task: Of a classifier of the transformers library: sequence-classification, token-classification, masked-lm,
            image-classification, audio-classification, ctc or encoder.
        weights: Of the kinds timm and torchvision: a safetensors file with the weights of the model that is named.
        options: Of the same: arguments of the library's constructor, such as {num_classes: 10}.
        batch_positions: Positions of a forward batch at most, padding included; halved on out-of-memory.
        top: Log-probabilities that a served or vllm teacher is asked for at a position.
        served_name: Of the model, as the server wants it; default: the first that it lists.
        key_env: Environment variable that holds the server's key; the key itself is written nowhere.
        requests: How many a server is sent at once.
        vocab_size: Of a served model: the length of its row of logits; default: the tokenizer's.
        checkpoint: Of kind student: the step of a checkpoint that the run keeps; default: the finished student.
        members: Of kind ensemble: its classifiers; given, `model` is what the ensemble is called and need not be.
        ensemble: What of the members is averaged; probabilities suits classes only.
        passes: Through each member of an ensemble; more than one with dropout at work.
    """

    model: str
    kind: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    compile: bool = False
    gguf_file: str | None = None
    revision: str | None = None
    tokenizer: str | None = None
    trust_remote_code: bool = False
    task: str = "sequence-classification"
    weights: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    batch_positions: int = 4096
    top: int = Field(default=5, ge=1)
    served_name: str | None = None
    key_env: str = "OPENAI_API_KEY"
    requests: int = Field(default=4, ge=1)
    vocab_size: int | None = Field(default=None, ge=1)
    checkpoint: int | None = Field(default=None, ge=0)
    members: tuple["TeacherConfig", ...] = ()
    ensemble: Literal["logits", "probabilities"] = "logits"
    passes: int = Field(default=1, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _named(cls, tree: Any) -> Any:
        return (
            {"model": "ensemble", "kind": "ensemble", **tree} if isinstance(tree, dict) and "members" in tree else tree
        )

    @model_validator(mode="after")
    def _belongs(self) -> "TeacherConfig":
        if (self.kind == "ensemble") != bool(self.members):
            raise ValueError("kind ensemble and members go together")
        if not self.members and self.passes > 1:
            raise ValueError("passes are of an ensemble: name the model in members")
        if self.checkpoint is not None and self.kind != "student":
            raise ValueError("checkpoint is of kind student")
        if (self.weights or self.options) and self.kind not in ("timm", "torchvision"):
            raise ValueError("weights and options are of the kinds timm and torchvision")
        return self


@dataclass(frozen=True, slots=True)
class TeacherOutput:
    """What a teacher gives for a batch, on its device.

    Attributes:
        rows: Last hidden states [N, D] when `head` is set, else raw logits [N, V]; samples one after the other.
        head: The output layer that turns rows into logits, or None.
        hidden: Layer name to features [N, D]; of an attention map D is the batch's longest sample.
    """

    rows: Tensor
    head: OutputHead | None = None
    hidden: Mapping[str, Tensor] = field(default_factory=dict)


class Teacher(Protocol):
    """A frozen model that gives one row a position; loads its weights on first use."""

    @property
    def vocab_size(self) -> int:
        """V, the length of a row of logits."""

    @property
    def max_length(self) -> int | None:
        """Longest input in tokens, None where there is no limit."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Identity of weights, configuration and dtype; holds no absolute path."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the forward pass."""

    def tokenizer(self) -> Any:
        """Return the model's transformers tokenizer, or None."""

    def hidden_width(self, layer: str) -> int:
        """Return D of a layer; an unknown layer is a ConfigError that lists those there are.

        Of an attention map, whose rows are as long as the sample, the number says nothing.
        """

    def output_head(self) -> OutputHead | None:
        """Return the output layer, or None where the model only gives logits."""

    def forward(self, inputs: Sequence[NDArray[np.int64]], layers: Sequence[str] = ()) -> TeacherOutput:
        """Return the rows of some samples, given their inputs (each sample's tokens but the last).

        Raises:
            TeacherError: The model failed; out-of-memory errors of torch are passed on as they are.
        """


@dataclass(frozen=True, slots=True)
class Candidates:
    """What a black box tells of one sample of L tokens; row t is about token t+1.

    Attributes:
        ids: int64 [L-1, C], the most likely ids, none left out between them; in any order.
        log_probabilities: float32 [L-1, C], at T = 1; minus infinity where there is no candidate.
        label_log_probabilities: float32 [L-1], token t+1's own; NaN where it was not told.
        lost: How many candidates or positions could not be used, by reason.
    """

    ids: NDArray[np.int64]
    log_probabilities: NDArray[np.float32]
    label_log_probabilities: NDArray[np.float32]
    lost: Mapping[str, int] = field(default_factory=dict)


@runtime_checkable
class BlackBox(Protocol):
    """A teacher that tells the log-probabilities of its likeliest tokens and no more."""

    def tell(self, samples: Sequence[NDArray[np.int64]]) -> list[Candidates]:
        """Return what the teacher says of whole samples, given the tokens int64 [L] of each.

        Raises:
            TeacherError: It failed, or does not say what can be used.
            AccessError, OutageError: It may not be asked, or did not answer.
        """


def load_teacher(config: TeacherConfig) -> Teacher:
    """Return the teacher that a config names.

    Raises:
        ConfigError: No such kind, device or dtype.
        AccessError: The model is not there or does not load.
    """
    kind = config.kind
    if kind == "auto":
        named = ":" in config.model and "/" not in config.model.split(":")[0]
        kind = "served" if "://" in config.model else "callable" if named else "transformers"
    teacher: Teacher = registry.find("kdcache.teachers", kind)(config)
    return teacher


def choose_device(name: str) -> torch.device:
    """Return the device of a name; auto is the accelerator if there is one.

    Raises:
        ConfigError: torch does not know the name, or the device is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"The device {name!r} cannot be used: {str(error).splitlines()[0]}",
            where="teacher.device",
            hint="Use auto, cpu, cuda or mps.",
        ) from error
    return device


def padded(inputs: Sequence[NDArray[np.int64]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return right-padded ids [S, T], their mask bool [S, T], and the places int64 [N] of real tokens in [S * T].

    The host does not wait for the device. Pads are id 0.
    """
    longest = max(len(one) for one in inputs)
    ids = np.zeros((len(inputs), longest), dtype=np.int64)
    mask = np.zeros((len(inputs), longest), dtype=np.bool_)
    for row, one in enumerate(inputs):
        ids[row, : len(one)] = one
        mask[row, : len(one)] = True
    places = torch.from_numpy(np.flatnonzero(mask))
    return upload(torch.from_numpy(ids), device), upload(torch.from_numpy(mask), device), upload(places, device)


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on a device, without waiting for what the device is doing."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
