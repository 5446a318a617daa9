"""Check a store: against its manifest, and against the live teacher it was captured from."""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import ConfigError, MismatchError
from kdcache.store import Problem, Store, check, open_store
from kdcache.store.rows import targets_of
from kdcache.targets import Targets

Array = NDArray[Any]

ROOM, WIDE_ROOM = 0.02, 0.25
"""Nats that live logits may differ from stored ones on average beside what their codec does: float32, 16 bits."""

FEATURE_ROOM = 0.05
"""Of a feature's mean absolute value: what live features may differ on average beside what their codec does."""

OF_TEXT = ("weights", "config", "vocab_size")
OF_EXAMPLES = ("kind", "task", "weights", "options", "mean", "passes")
"""Members of a fingerprint that must be the recorded ones; others say where a model lay, or what its library is."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a verification found.

    Attributes:
        problems: Every fault; empty for a sound store.
        objects: Objects checked.
        bytes: Of them.
        quick: Whether only presence and sizes were checked.
        rows_compared: Positions compared with the live teacher.
        top1_agreement: Share of them where store and teacher put the same id first.
        max_logit_difference: Largest difference of a kept logit, in nats.
        mean_logit_difference: Mean of the same.
        feature_differences: Feature to its mean difference, as a share of its mean absolute value.
    """

    problems: tuple[Problem, ...]
    objects: int
    bytes: int
    quick: bool
    rows_compared: int = 0
    top1_agreement: float | None = None
    max_logit_difference: float | None = None
    mean_logit_difference: float | None = None
    feature_differences: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form; a difference from what is no number is null."""
        told = asdict(self)
        for group, names in (
            (told, ("max_logit_difference", "mean_logit_difference")),
            (told["feature_differences"], tuple(self.feature_differences)),
        ):
            for name in names:
                group[name] = group[name] if group[name] is not None and math.isfinite(group[name]) else None
        return {**told, "ok": not self.problems}


@dataclass(frozen=True, slots=True)
class _Both:
    """Some rows as they are stored, and as the live teacher gives them.

    Attributes:
        stored: The store's.
        live: The teacher's, of as many entries.
        room: Nats of mean difference that are no other answer.
        features: Name to what is stored, what is live, and the mean difference that is no other feature.
    """

    stored: Targets
    live: Targets
    room: float
    features: Mapping[str, tuple[Array, Array, float]] = field(default_factory=dict)


def verify(
    path: Path | str,
    *,
    quick: bool = False,
    teacher: Any = None,
    examples: Path | str | None = None,
    rows: int = 256,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Return what is wrong with a store; reads everything unless quick.

    Args:
        path: Its folder.
        quick: Presence and sizes only.
        teacher: To run again over some samples: a model's name, a `kdcache.teachers.TeacherConfig`, a `Teacher`, or of
            examples a `kdcache.classifiers.Classifier`; None for none.
        examples: Folder of the inputs of a classifier's store.
        rows: Positions to compare with it, at least.
        seed: Chooses the samples.
        progress: Called with objects done and all.

    Raises:
        ConfigError: A classifier's store is compared without its examples.
        MismatchError: The teacher is not the one that was captured, or the examples are not those it was given.
        IncompleteStoreError, CorruptObjectError, UnsupportedError: There is no manifest to check against.
    """
    store = open_store(path)
    problems = tuple(check(store, quick=quick, progress=progress))
    report = Report(problems, len(store.manifest.objects), store.nbytes, quick)
    if teacher is None or problems:
        return report
    order = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(len(store))
    if store.manifest.kind == "causal_lm":
        return _compared(report, _of_text(store, teacher, order), rows)
    return _compared(report, _of_examples(store, teacher, examples, order), rows)


def _of_text(store: Store, teacher: Any, order: Array) -> Iterator[_Both]:
    import torch

    from kdcache.taps import MAP
    from kdcache.targets.measure import measure_rows
    from kdcache.teachers import TeacherConfig, load_teacher

    recorded = store.manifest.part("teacher")
    if isinstance(teacher, str):
        teacher = TeacherConfig(model=teacher, dtype=recorded.get("dtype", "auto"))
    if isinstance(teacher, TeacherConfig):
        teacher = load_teacher(teacher)
    _require_same(store, teacher.fingerprint, OF_TEXT)
    layers = {name: keep for name, keep in store.manifest.layers.items() if f"hidden.{name}" in store.columns}
    for number in order:
        sample = store[int(number)]
        output = teacher.forward([sample.input_ids[:-1]], list(layers))
        labels = torch.from_numpy(sample.labels).to(output.rows.device)
        with torch.inference_mode():
            live = measure_rows(output.rows, labels, k=store.k, head=output.head).numpy()
        features = {}
        for name, keep in layers.items():
            own, found = sample.hidden[name], output.hidden[name].float().cpu().numpy()
            # a map is kept with room for a longer sample's keys
            room = own.shape[1] - found.shape[1]
            if room < 0 or (room and not name.startswith(MAP)):
                raise MismatchError(
                    f"The teacher's layer {name!r} is {found.shape[1]} wide, and the store's {own.shape[1]}.",
                    where=store.location,
                )
            found = np.pad(found, ((0, 0), (0, room)))
            found = found * sample.loss_mask[:, None] if keep == "masked" else found
            features[name] = own, found, _feature_room(store, name, own)
        yield _Both(sample.targets, live, WIDE_ROOM, features)


def _of_examples(store: Store, teacher: Any, examples: Path | str | None, order: Array) -> Iterator[_Both]:
    from kdcache.capture.answers import ExampleRows
    from kdcache.capture.config import CaptureConfig
    from kdcache.classifiers import load_classifier
    from kdcache.config import parse_config
    from kdcache.examples import Examples
    from kdcache.teachers import TeacherConfig

    if examples is None:
        raise ConfigError(
            "A classifier's store does not hold its inputs.",
            where=store.location,
            hint="Give the folder of examples by --examples, or the capture's file by --config.",
        )
    recorded, capture = store.manifest.part("teacher"), store.manifest.part("capture")
    if isinstance(teacher, str):
        kept = {key: recorded[key] for key in ("kind", "task", "options") if recorded.get(key)}
        teacher = parse_config(TeacherConfig, {"model": teacher, **kept})
    if isinstance(teacher, TeacherConfig):
        teacher = load_classifier(teacher)
    _require_same(store, teacher.fingerprint, OF_EXAMPLES)
    asked = {key: value for key, value in capture["examples"].items() if key != "tokens"}
    asked["features"] = [one for one in asked["features"] if f"hidden.{one['name']}" in store.columns]
    settings = {name: capture[name] for name in ("targets", "store")}
    tree = {**settings, "examples": {**asked, "path": str(examples)}, "teacher": {"model": str(recorded.get("name"))}}
    config = parse_config(CaptureConfig, tree)
    found = Examples(examples)
    answers = ExampleRows(config, found, teacher)
    if answers.plan.vocab_size != store.vocab_size:
        raise MismatchError(
            f"The teacher has {answers.plan.vocab_size} outputs, and the store is of one with {store.vocab_size}.",
            where=store.location,
        )
    wide = str(answers.dtype) in ("torch.float16", "torch.bfloat16")
    assert config.examples is not None  # it was written above
    for begin in range(0, len(order), config.examples.batch_size):
        numbers = np.sort(order[begin : begin + config.examples.batch_size])
        yield _answered(store, answers, found, numbers, room=WIDE_ROOM if wide else ROOM)


def _answered(store: Store, answers: Any, examples: Any, numbers: Array, *, room: float) -> _Both:
    firsts = [shard.first_sample for shard in store.shards]
    homes = [bisect_right(firsts, int(number)) - 1 for number in numbers]
    samples = [store[int(number)] for number in numbers]
    columns, digests = answers.batch(examples.places(one.id for one in samples))
    labels = np.concatenate([one.labels for one in samples])
    for number, home, sample, digest in zip(numbers, homes, samples, digests, strict=True):
        if store.sample_table(home)["token_digest"][int(number) - firsts[home]].as_py() != digest:
            raise MismatchError(
                f"The sample {sample.id!r} is not what the teacher was given.",
                where=str(examples.folder),
                hint="Give the examples that the store was captured from.",
            )
    if len(labels) != len(columns["labels"]) or not np.array_equal(labels, columns["labels"]):
        raise MismatchError(
            "The labels of the examples are not those of the store.",
            where=str(examples.folder / "label.npy"),
            hint="Give the examples that the store was captured from.",
        )
    stored = Targets(
        ids=np.concatenate([one.targets.ids for one in samples]),
        logits=np.concatenate([one.targets.logits for one in samples]),
        tail=np.concatenate([one.targets.tail for one in samples]),
        label_logit=np.concatenate([one.targets.label_logit for one in samples]),
        vocab_size=store.vocab_size,
    )
    live = targets_of(columns, store.vocab_size).narrow(store.k)
    features = {}
    for name in samples[0].hidden:
        own = columns[f"hidden.{name}"]
        stored_feature = np.concatenate([one.hidden[name] for one in samples])
        features[name] = stored_feature, own, _feature_room(store, name, own)
    return _Both(stored, live, room + _rounding(store, "head_logits", live.logits), features)


def _feature_room(store: Store, name: str, values: Array) -> float:
    """Return what a feature may differ by on average."""
    return 2 * _rounding(store, f"hidden.{name}", values) + FEATURE_ROOM * float(np.abs(values).mean())


def _rounding(store: Store, column: str, values: Array) -> float:
    """Return what a column's codec changes values by, on average."""
    codec = store.columns[column].build()
    return float(np.abs(codec.decode(codec.encode(values)) - values).mean())


def _require_same(store: Store, found: Mapping[str, Any], members: tuple[str, ...]) -> None:
    recorded = store.manifest.part("teacher")
    different = [key for key in members if found.get(key) != recorded.get(key)]
    if different:
        raise MismatchError(
            f"This is not the teacher that was captured: {', '.join(different)} differ.",
            where=store.location,
            hint=f"The store was captured from {recorded.get('name')}, weights {str(recorded.get('weights'))[:12]}.",
        )


def _skipped(both: _Both) -> NDArray[np.bool_]:
    """Return the positions where the teacher has no numbers, and had none when it was captured: zeros stand there."""
    numbers, told = np.isfinite(both.live.logits).all(axis=-1), both.stored.logits.any(axis=-1)
    return np.asarray(~(numbers | told), dtype=np.bool_)


def _compared(report: Report, pairs: Iterator[_Both], rows: int) -> Report:
    compared, same, largest, total, room, looked_at = 0, 0, 0.0, 0.0, 0.0, 0
    shares: dict[str, list[tuple[float, float, float]]] = {}
    for both in pairs:
        # the same ids may change places where logits are close: compare rank by rank
        kept = ~_skipped(both)
        looked_at += len(kept)
        # logits that are no numbers are as far off as can be
        difference = np.nan_to_num(np.abs(both.live.logits - both.stored.logits)[kept], nan=np.inf)
        count = len(difference)
        if count == 0:
            continue
        same += int((both.live.ids[kept, 0] == both.stored.ids[kept, 0]).sum())
        largest = max(largest, float(difference.max()))
        total += float(difference.mean()) * count
        room += both.room * count
        compared += count
        for name, (stored, live, allowed) in both.features.items():
            off = float(np.nan_to_num(np.abs(stored - live)[kept], nan=np.inf).mean())
            shares.setdefault(name, []).append((off, allowed, float(np.abs(stored[kept]).mean())))
        if compared >= rows:
            break
    problems = list(report.problems)
    if not compared:
        what = f"the live teacher has no numbers, and had none, at all of the {looked_at} positions looked at"
        return replace(report, problems=(*problems, Problem("columns/head_logits", what)))
    if same / compared < 0.9 or total > room:
        what = f"the live teacher says something else: same first candidate at {same / compared:.3f} of the positions"
        problems.append(Problem("columns/head_logits", what))
    features = {}
    for name, found in shares.items():
        off, allowed, size = (sum(parts) / len(found) for parts in zip(*found, strict=True))
        features[name] = off / size if size else 0.0
        if off > allowed:
            what = f"the live teacher's differs by {features[name]:.3f} of its mean size"
            problems.append(Problem(f"columns/hidden.{name}", what))
    return replace(
        report,
        problems=tuple(problems),
        rows_compared=compared,
        top1_agreement=same / compared,
        max_logit_difference=largest,
        mean_logit_difference=total / compared,
        feature_differences=features,
    )
