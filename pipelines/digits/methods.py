"""Digits: the same student from the same teacher's store by every loss there is, and by every way to weigh them.

    python -m pipelines.digits.methods --group divergences

Goes on in the folder of `pipelines.digits.recipe`: the same data, teacher and stores. Stopped, the same command goes
on; without a group it runs all of them. Weights of terms and powers of scores were set once and not tuned.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from kdcache.evaluate import evaluate
from kdcache.examples import Examples
from kdcache.metrics import summary
from kdcache.seeds import MEASURED, Table, compare_variants, folder_of, merged
from pipelines.digits.recipe import FEATURES, HELD_OUT, VIEWS, digits, examples, settings, store
from pipelines.digits.teachers import labelled, taught

Variants = Mapping[str, dict[str, Any]]

HINTON: dict[str, Any] = {"temperature": 4.0, "alpha": 0.9}
BOTH = {"hard labels": {"loss": {"alpha": 0.0}}, "Hinton, T = 4": {"loss": HINTON}}


def _losses(**found: dict[str, Any]) -> Variants:
    return {name.replace("_", " "): {"loss": {**HINTON, **one}} for name, one in found.items()}


def _terms(layer: str, **found: dict[str, Any]) -> Variants:
    return {
        f"+ {name.replace('_', ' ')}": {"loss": {**HINTON, "hidden": [{"teacher": layer, "student": layer, **one}]}}
        for name, one in found.items()
    }


DIVERGENCES = _losses(
    reverse_KL={"divergence": "reverse_kl"},
    JSD={"divergence": "jsd", "options": {"beta": 0.5}},
    skew_KL={"divergence": "skew_kl"},
    skew_reverse_KL={"divergence": "skew_reverse_kl"},
    total_variation={"divergence": "total_variation"},
    adaptive_KL={"divergence": "adaptive_kl"},
)

RESPONSES = {
    **_losses(
        DKD={"divergence": "dkd", "options": {"beta": 1.0}},
        standardised_logits={"divergence": "standardised_kl", "temperature": 2.0},
        logit_MSE={"divergence": "logit_mse"},
        DIST={"divergence": "dist", "temperature": 1.0, "alpha": 0.7},
    ),
    "ranking": {"loss": {"divergence": "ranking", "alpha": 0.5}},
    "ranking, first 3": {"loss": {"divergence": "ranking", "alpha": 0.5, "options": {"top": 3}}},
}

THREE = _losses(bucket_of_3={"tail": "bucket"}, renormalised_3={"tail": "renormalise"})

FEATURE_TERMS = {
    **_terms(
        "hidden",
        hint={"kind": "mse", "weight": 0.05},
        hint_normalised={"kind": "mse", "weight": 0.2, "normalise": True},
        cosine={"kind": "cosine", "weight": 0.5},
        smooth_L1={"kind": "smooth_l1", "weight": 0.1},
    ),
    **_terms("second", attention_transfer={"kind": "attention_transfer", "weight": 0.5}),
}

RELATIONS = _terms(
    "hidden",
    RKD_distance={"kind": "rkd_distance"},
    RKD_angle={"kind": "rkd_angle"},
    similarity_preserving={"kind": "similarity_preserving"},
    PKT={"kind": "pkt"},
    CKA={"kind": "cka"},
    CRD={"kind": "crd", "weight": 0.1},
)

WEIGHTS = {
    f"weight: {by} ^ {power:g}": {"loss": {**HINTON, "weights": {"by": by, "power": power}}}
    for by, power in (
        ("teacher_loss", 0.5),
        ("entropy", 0.5),
        ("entropy", -0.5),
        ("confidence", 1.0),
        ("margin", 1.0),
        ("correct", 1.0),
        ("student_loss", 0.5),
    )
}

SCHEDULES = {
    **{
        f"T 4 to 1, {shape}": {"loss": {**HINTON, "temperature": {"start": 4.0, "end": 1.0, "schedule": shape}}}
        for shape in ("linear", "cosine")
    },
    **{
        f"alpha 1 to 0.5, {shape}": {"loss": {**HINTON, "alpha": {"start": 1.0, "end": 0.5, "schedule": shape}}}
        for shape in ("linear", "cosine", "constant")
    },
}


TEACHERS = {
    f"both teachers, {combine}": {"loss": {**HINTON, "combine": combine}} for combine in ("fixed", "confidence", "loss")
}

SCHEMES: Variants = {
    "T 2 where the teacher is sure, to 8": {"loss": {**HINTON, "temperature": {"sure": 2.0, "unsure": 8.0}}},
    "T 8 where the teacher is sure, to 2": {"loss": {**HINTON, "temperature": {"sure": 8.0, "unsure": 2.0}}},
    **{
        f"T learned, {towards}": {"loss": {**HINTON, "temperature": {"towards": towards, "high": 8.0}}}
        for towards in ("harder", "easier")
    },
    **{
        f"sampled by {by} ^ 0.5": {"loss": HINTON, "data": {"sampling": {"by": by, "power": 0.5}}}
        for by in ("entropy", "teacher_loss")
    },
    **_terms("hidden", CRD_with_256_negatives={"kind": "crd", "weight": 0.1, "negatives": 256}),
}

VARIANTS: tuple[Variants, ...] = (
    BOTH,
    DIVERGENCES,
    RESPONSES,
    THREE,
    FEATURE_TERMS,
    RELATIONS,
    WEIGHTS,
    SCHEDULES,
    TEACHERS,
    SCHEMES,
)


@dataclass(frozen=True, slots=True)
class Place:
    """What all groups work on.

    Attributes:
        out: Folder of the recipe.
        own: The students' digits.
        base: Of a training.
        seeds: Of the runs.
    """

    out: Path
    own: Examples
    base: dict[str, Any]
    seeds: range

    def viewed(self, name: str, changed: Mapping[str, Any]) -> Path:
        """Return the store of a teacher's answers to the views of the students' digits."""
        return store(self.out, name, self.own, merged({"examples": {"augment": VIEWS}}, changed))

    def compared(self, variants: Variants, source: Path | None = None, folder: str = "main") -> Table:
        """Train from a store, that of the recipe unless another is given, and return the table."""
        found = source or self.viewed("store", {"examples": {"features": FEATURES}})
        return compare_variants(self.base, variants, found, self.out / "methods" / folder, seeds=self.seeds)


def ordinary(variants: Variants, place: Place) -> list[Table]:
    """Train from the recipe's store."""
    return [place.compared({**BOTH, **variants})]


def tails(place: Place) -> list[Table]:
    """Train from a store of three of ten outputs, by each tail policy that works from a head."""
    three = place.viewed("store-of-3", {"targets": {"k": 3}})
    return [place.compared(BOTH), place.compared(THREE, three, "three")]


def several(place: Place) -> list[Table]:
    """Train from several teachers, and from passes through one with its dropout at work."""
    pixels, label = digits(place.out / "data")
    labels = labelled(place.out, "for-teachers", pixels=pixels[:-HELD_OUT], label=label[:-HELD_OUT])
    weak = taught(place.out, "weak-teacher", labels, {"run": {"steps": 60, "seed": 1}})
    dropping = {"factory": "pipelines.digits.networks:dropping"}
    thinned = taught(place.out, "dropping-teacher", labels, {"student": dropping, "run": {"seed": 2}})
    said = place.viewed("weak-store", {"teacher": {"kind": "student", "model": str(weak)}})
    members = [{"kind": "student", "model": str(thinned), "device": "cpu"}]
    passes = {"kind": "ensemble", "model": "passes", "ensemble": "probabilities", "members": members, "passes": 8}
    both = {name: {**one, "data": {"teachers": [{"store": str(said)}]}} for name, one in TEACHERS.items()}
    once = place.viewed("dropping-store", {"teacher": {"kind": "student", "model": str(thinned)}})
    return [
        place.compared({**BOTH, **both}),
        place.compared({"from the weak teacher": {"loss": HINTON}}, said, "weak"),
        place.compared({"from the dropout teacher": {"loss": HINTON}}, once, "dropping"),
        place.compared({"its 8 passes": {"loss": HINTON}}, place.viewed("passes-store", {"teacher": passes}), "passes"),
    ]


def schemes(place: Place) -> list[Table]:
    """Train by temperatures and samplings of their own, and measure the running mean of a student's weights too."""
    name = "Hinton, with its mean kept"
    found = place.compared({**BOTH, **SCHEMES, name: {"loss": HINTON, "run": {"ema": 0.99}}})
    folders = [place.out / "methods" / "main" / folder_of(name) / str(seed) / "ema" for seed in place.seeds]
    told = [evaluate(one, batch_size=250) for one in folders]
    values = {one: summary([getattr(metrics, one) for metrics in told]) for one in MEASURED}
    spread = {one: (value.mean, value.deviation) for one, value in values.items()}
    own = replace(found.rows[-1], name="running mean of its weights, 0.99", metrics=spread)
    return [replace(found, rows=[*found.rows[:-1], own])]


GROUPS: dict[str, Callable[[Place], list[Table]]] = {
    "divergences": partial(ordinary, DIVERGENCES),
    "responses": partial(ordinary, RESPONSES),
    "tails": tails,
    "features": partial(ordinary, FEATURE_TERMS),
    "relations": partial(ordinary, RELATIONS),
    "weights": partial(ordinary, WEIGHTS),
    "schedules": partial(ordinary, SCHEDULES),
    "teachers": several,
    "schemes": schemes,
}


def main() -> None:
    """Run one group, or all, and print a table of each."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    arguments.add_argument("--group", choices=GROUPS, action="append")
    arguments.add_argument("--out", type=Path, default=Path("runs/digits"))
    arguments.add_argument("--epochs", type=int, default=40)
    arguments.add_argument("--seeds", type=int, default=3)
    given = arguments.parse_args()
    own, held = examples(given.out)
    held_out = store(given.out, "held-out-store", held, {"examples": {"features": FEATURES}})
    place = Place(given.out, own, settings(own, held, held_out, given.epochs), range(given.seeds))
    for name in given.group or GROUPS:
        tables = GROUPS[name](place)
        whole = replace(tables[0], rows=[row for one in tables for row in one.rows]).markdown()
        (given.out / "methods" / f"{name}.md").write_text(whole)
        print(f"{name}\n\n{whole}")


if __name__ == "__main__":
    main()
