"""The keys of a training run; a student is enough."""

from typing import Any, Literal

from pydantic import Field, model_validator

from kdcache.config import Section
from kdcache.losses.difficulty import Score
from kdcache.stream.sampling import SamplingConfig


class Schedule(Section):
    """A value that changes over a run.

    Attributes:
        start: At the first step.
        end: At the last step.
        schedule: How it goes from one to the other.
    """

    start: float
    end: float
    schedule: Literal["constant", "linear", "cosine"] = "linear"


class EntropyTemperature(Section):
    """A temperature for each position, by how sure the teacher is there; see kdcache/train/temperature.py.

    Attributes:
        sure: T where the teacher is certain.
        unsure: T where all outcomes are alike; in between by the teacher's entropy.
    """

    sure: float = Field(gt=0)
    unsure: float = Field(gt=0)


class LearnedTemperature(Section):
    """One temperature that is learned while training; see kdcache/train/temperature.py.

    Attributes:
        low: Smallest T.
        high: Largest T.
        start: At the first step, between them.
        towards: harder (it rises where that raises the loss) or easier.
    """

    low: float = Field(default=1.0, gt=0)
    high: float = 20.0
    start: float = 4.0
    towards: Literal["harder", "easier"]

    @model_validator(mode="after")
    def _between(self) -> "LearnedTemperature":
        if not self.low < self.start < self.high:
            raise ValueError("low, start and high rise")
        return self


class StudentConfig(Section):
    """Which model is trained; exactly one of model, config and factory.

    Attributes:
        model: Folder or hub name of a checkpoint.
        config: A transformers configuration from scratch: model_type and its sizes; the vocabulary is the teacher's,
            or that of `tokenizer`.
        factory: `module:function`, called with `vocab_size`, returning an nn.Module from (input_ids, attention_mask)
            [S, T] to logits [S, T, V] (or an object with `.logits`); from a classifier's store, from the inputs by
            name to [S, C] or [S, T, C], and `vocab_size` is C.
        task: Head of a transformers student of a classifier's store; default: sequence-classification.
        tokenizer: Folder or hub name of the student's own tokenizer, where it is not the teacher's; `loss.divergence`
            is then span_likelihood or uld.
        dtype: Of the weights.
        keep_layers: Of `model`, how many of its layers (spread evenly) or which, counted from 1; the others are left
            out before the first step. Begin with the teacher's folder to have a student of the teacher's layers.
        revision: Of a hub model, or of its tokenizer.
        any_template: Accept a checkpoint whose tokenizer writes chats otherwise than the teacher's.
    """

    model: str | None = None
    config: dict[str, Any] | None = None
    factory: str | None = None
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    revision: str | None = None
    any_template: bool = False
    keep_layers: int | tuple[int, ...] | None = None
    task: str | None = None

    @model_validator(mode="after")
    def _one_of_three(self) -> "StudentConfig":
        if sum(value is not None for value in (self.model, self.config, self.factory)) != 1:
            raise ValueError("give exactly one of model, config and factory")
        if self.keep_layers is not None and self.model is None:
            raise ValueError("keep_layers goes with model")
        return self


class TeacherStoreConfig(Section):
    """A further store of the same samples, of another teacher.

    Attributes:
        store: Folder or URL.
        weight: What this teacher counts beside the others.
    """

    store: str
    weight: float = Field(default=1.0, gt=0)


class DataConfig(Section):
    """What is read, and in which order.

    Attributes:
        batch_size: Samples of a micro-batch and rank.
        workers: Processes that decompress shards; 0 leaves it to threads.
        seed: Of the order; default: the run's.
        shuffle: In the order of (seed, epoch), else the store's.
        pool_shards: Shards whose samples are mixed.
        sampling: Samples that come more often, by what the teacher said: {by: teacher_loss, entropy, confidence,
            margin or correct, power, least}; see kdcache/stream/sampling.py.
        validation: A held-out store, for validation and early stopping.
        examples: Folder of the inputs of a classifier's store.
        inputs: Parameter of the student to field of the examples; default: as the teacher was given.
        validation_examples: Folder of the held-out store's inputs; default: `examples`.
        teachers: Stores of other teachers, joined by sample id; see kdcache/train/teachers.py.
        weight: What the main store's teacher counts beside them.
    """

    batch_size: int = Field(default=8, ge=1)
    workers: int = Field(default=0, ge=0)
    seed: int | None = None
    shuffle: bool = True
    pool_shards: int = Field(default=4, ge=1)
    sampling: SamplingConfig | None = None
    validation: str | None = None
    examples: str | None = None
    inputs: dict[str, str] = Field(default_factory=dict)
    validation_examples: str | None = None
    teachers: tuple[TeacherStoreConfig, ...] = ()
    weight: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _drawn(self) -> "DataConfig":
        if self.sampling is not None and not self.shuffle:
            raise ValueError("sampling goes with shuffle: the store's own order has each sample once")
        return self


class HiddenLossConfig(Section):
    """One pair of layers that are made alike.

    Attributes:
        teacher: Layer name in the store.
        student: final, embedding, or the number of a layer from 1; of a student of examples a tap (kdcache/taps.py).
        kind: mse, cosine, smooth_l1 (after a learned projection of the student's features) or attention_transfer;
            rkd_distance, rkd_angle, similarity_preserving, pkt, cka, crd (among the samples of a batch); map_kl,
            map_mse, value_relation (attention).
        weight: Factor on the term.
        options: Of the loss, such as {beta: 0.5}.
        normalise: The teacher's features by their mean and variance in the store.
        negatives: Samples outside the batch that `crd` holds each sample against, drawn from the store at every step.
    """

    teacher: str = "final"
    student: str = "final"
    kind: str = "mse"
    weight: float = 1.0
    options: dict[str, Any] = Field(default_factory=dict)
    normalise: bool = False
    negatives: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _contrastive(self) -> "HiddenLossConfig":
        if self.negatives and self.kind != "crd":
            raise ValueError("negatives are for the kind crd")
        return self


class PairsConfig(Section):
    """Pairs of numbered layers by a rule, in place of naming each.

    Attributes:
        rule: last (the last of both sides, one by one) or every (the student's layers spread over the teacher's).
        count: Pairs of `last`; of `every` all layers of the student.
        kind: As of a pair.
        weight: Of each.
        options: Of the loss.
    """

    rule: Literal["last", "every"]
    count: int = Field(default=1, ge=1)
    kind: str = "mse"
    weight: float = 1.0
    options: dict[str, Any] = Field(default_factory=dict)


class WeightConfig(Section):
    """Positions that count more; see kdcache/train/weights.py.

    Attributes:
        by: Score of a position.
        power: Of the score; negative turns it round.
    """

    by: Score | Literal["student_loss"]
    power: float = 1.0


class LossConfig(Section):
    """alpha * T**2 * divergence(T) + (1 - alpha) * cross-entropy + the hidden terms, averaged over positions.

    Attributes:
        divergence: forward_kl, reverse_kl, jsd, skew_kl, skew_reverse_kl, total_variation, adaptive_kl; or a response
            loss: logit_mse, standardised_kl, dkd, dist, ranking, sigmoid, regression; or a span loss, of a student with
            a tokenizer of its own: span_likelihood, uld; or a plug-in's name.
        beta: Of jsd; the same as options.beta.
        options: Of the divergence, such as {skew: 0.1}.
        hard: What the labels are held against: cross_entropy (classes), sigmoid (a value of 0 to 1 each output) or mse
            (any value each output).
        weights: Positions that count more.
        temperature: T of both sides: a number, a schedule, {sure, unsure} (by the teacher's entropy at the position)
            or {towards: harder} (learned).
        alpha: Weight of the divergence; 0 is hard labels alone, and the teacher's rows are not read.
        tail: bucket (a lower bound), sampled (unbiased, needs draws), exact (needs an exact store), or renormalise
            (biased, to compare).
        combine: What each of several teachers (data.teachers) counts: fixed, confidence (more where it is sure), or
            loss (more where it knows the label).
        hidden: Pairs of layers.
        pairs: More of them, by a rule over the numbered layers that the store keeps.
        chunk_positions: Positions of the output layer at a time: the largest tensors are this many rows of logits. 0
            takes what suits vocabulary and device: 25 MB a tensor on the CPU, 268 MB on an accelerator.
    """

    divergence: str = "forward_kl"
    beta: float | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    hard: Literal["cross_entropy", "sigmoid", "mse"] = "cross_entropy"
    weights: WeightConfig | None = None
    temperature: float | Schedule | EntropyTemperature | LearnedTemperature = 1.0
    alpha: float | Schedule = 0.9
    tail: Literal["bucket", "sampled", "exact", "renormalise"] = "bucket"
    combine: Literal["fixed", "confidence", "loss"] = "fixed"
    hidden: tuple[HiddenLossConfig, ...] = ()
    pairs: PairsConfig | None = None
    chunk_positions: int = Field(default=0, ge=0)


class OptimConfig(Section):
    """AdamW with warm-up and decay.

    Attributes:
        learning_rate: At its highest.
        betas: Of AdamW.
        weight_decay: On matrices; not on biases and norms.
        warmup_steps: Steps of linear rise.
        schedule: From there to the end.
        final_share: Share of the learning rate left at the end.
        clip_norm: Largest norm of the gradient; 0 for no limit.
    """

    learning_rate: float = Field(default=1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    warmup_steps: int = Field(default=20, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_share: float = 0.05
    clip_norm: float = 1.0


class RunConfig(Section):
    """How long, and what is kept.

    Attributes:
        epochs: Passes over the store; ignored where `steps` is set.
        steps: Optimiser steps.
        accumulation: Micro-batches a step.
        precision: Autocast of the forward pass.
        device: auto, cpu or cuda; ranks of a launcher take their own.
        seed: Of the student's weights, dropout and order.
        checkpoint_every: Steps between checkpoints; 0 keeps one at the end of every epoch.
        validate_every: Steps between validations; 0 validates at the end of every epoch.
        metric: What early stopping looks at.
        snapshot_every: Steps between students that are kept under `snapshots/`; 0 keeps none. Each is used as a run's
            folder is: by eval, by export, or as a teacher.
        ema: Decay of the running mean of the student's weights, such as 0.999, kept under `ema/` as it is when the run
            ends; 0 keeps none.
        patience: Validations without a better metric before stopping; 0 never stops early.
    """

    epochs: int = Field(default=1, ge=1)
    steps: int | None = Field(default=None, ge=1)
    accumulation: int = Field(default=1, ge=1)
    precision: Literal["no", "bf16", "fp16"] = "no"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    checkpoint_every: int = Field(default=0, ge=0)
    validate_every: int = Field(default=0, ge=0)
    metric: Literal["cross_entropy", "kl"] = "cross_entropy"
    snapshot_every: int = Field(default=0, ge=0)
    ema: float = Field(default=0.0, ge=0, lt=1)
    patience: int = Field(default=0, ge=0)


class TrainConfig(Section):
    """One training run."""

    student: StudentConfig
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _told_apart(self) -> "TrainConfig":
        kinds = [*(one.kind for one in self.loss.hidden), *([self.loss.pairs.kind] if self.loss.pairs else [])]
        if self.data.sampling is not None and "crd" in kinds:
            raise ValueError("data.sampling repeats samples, and crd tells each sample of a batch from the others")
        return self

    @model_validator(mode="after")
    def _measured(self) -> "TrainConfig":
        if self.run.patience and self.data.validation is None:
            raise ValueError("run.patience looks at a held-out store, which data.validation names")
        return self
