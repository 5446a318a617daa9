"""Black box: SmolLM2 behind HTTP tells five log-probabilities a position, and a small Llama learns from those.

    python -m pipelines.smollm2_served.recipe [--out runs/smollm2_served] [--url http://127.0.0.1:8000/v1] [--seeds 3]

Needs `make models`. Without a URL the recipe starts a server of its own. Stopped, the same command goes on. Ends in the
table of the README beside this file.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from kdcache import display
from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.config import parse_config
from kdcache.demo import teacher_folder, write_articles
from kdcache.seeds import compare_variants
from pipelines.smollm2_wiki.methods import settings, store

TOP = 5
"""Candidates of a position: what OpenAI's own servers tell at most."""


@contextmanager
def serving(url: str | None) -> Iterator[str]:
    """Give the URL of a server, or of one that runs until the end of the block."""
    if url is not None:
        yield url
        return
    line = [sys.executable, "-m", "pipelines.smollm2_served.server", str(teacher_folder()), "--port", "0"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None  # it is a pipe
        try:
            if not (said := job.stdout.readline().strip()):
                raise SystemExit("The server did not start.")
            yield said
        finally:
            job.terminate()


def told(out: Path, data: Path, url: str | None) -> Path:
    """Capture what a server tells of the articles; return the store's folder."""
    with serving(url) as place, display.capture_progress(quiet=False) as progress:
        tree = {
            "source": {"path": str(data / "train.jsonl"), "id_field": "id"},
            "samples": {"max_length": 256},
            "teacher": {"model": place, "tokenizer": str(teacher_folder()), "top": TOP, "requests": 2},
            "store": {"shard_positions": 16384},
            "licences": {"teacher": "Apache-2.0", "data": "CC-BY-SA-4.0"},
        }
        capture(parse_config(CaptureConfig, tree), out / "told", progress=progress)
    return out / "told"


def main() -> None:
    """Run the recipe and print its table."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    arguments.add_argument("--out", type=Path, default=Path("runs/smollm2_served"))
    arguments.add_argument("--url", help="of a server that serves SmolLM2-135M-Instruct, up to /v1")
    arguments.add_argument("--articles", type=int, default=180, help="articles to train on")
    arguments.add_argument("--seeds", type=int, default=3)
    given = arguments.parse_args()
    out: Path = given.out
    data = write_articles(out / "data", given.articles, 60)
    held_out, whole = (store(out, data, name) for name in ("held-out", "train"))
    base, seeds = settings(held_out), range(given.seeds)
    served = {"hard labels": {"loss": {"alpha": 0.0}}, f"{TOP} log-probabilities over HTTP": {}}
    black = compare_variants(base, served, told(out, data, given.url), out / "students-told", seeds=seeds)
    white = compare_variants(base, {"64 logits of the model itself": {}}, whole, out / "students", seeds=seeds)
    table = replace(black, rows=[*black.rows, *white.rows]).markdown()
    (out / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
