"""The rules of docs/architecture.md that a machine can check."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import kdcache

PACKAGE = Path(kdcache.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
BANNED = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_short_and_free_of_what_is_banned(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    tree = ast.parse(text)
    assert not imported(tree) & BANNED
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not calls & {"torch.load", "torch.save", "yaml.load", "eval", "exec", "print"}
    assert path.stem not in {"utils", "helpers", "common", "base", "misc", "manager", "handler"}


@pytest.mark.parametrize("family", ["store", "codecs", "sources", "capture", "teachers"])
def test_temperature_is_no_word_of_what_stores(family: str) -> None:
    for path in (PACKAGE / family).rglob("*.py"):
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        names |= {node.arg for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.arg)}
        assert "temperature" not in names, path


def test_public_names_are_sorted_and_real() -> None:
    assert kdcache.__all__ == sorted(kdcache.__all__)
    for name in kdcache.__all__:
        assert getattr(kdcache, name) is not None
    assert set(kdcache.__all__) <= set(dir(kdcache))
    with pytest.raises(AttributeError, match="no attribute"):
        kdcache.nothing  # noqa: B018


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, kdcache; sys.exit(any(name in sys.modules for name in ('torch', 'zarr', 'numpy', 'pyarrow')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_importing_every_module_writes_no_file_and_opens_no_socket() -> None:
    code = """
import sys
def watch(event, args):
    if event.startswith("socket.connect") or (event == "open" and args[1] and any(c in str(args[1]) for c in "wax+")):
        if "__pycache__" not in str(args[0]) and not str(args[0]).startswith("/dev/"):
            print(event, args, file=sys.stderr); sys.exit(1)
sys.addaudithook(watch)
import kdcache.store, kdcache.samples, kdcache.describe, kdcache.cli, kdcache.display
"""
    done = subprocess.run([sys.executable, "-B", "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


STAGES = [f"{stage}.{stage}" for stage in ("capture", "evaluate", "train", "verify")]


@pytest.mark.parametrize("name", [*(one for one in kdcache.__all__ if one != "__version__"), *STAGES])
def test_public_things_are_documented(name: str) -> None:
    # a stage's function stands in the module of its name, which has to be imported before it is there
    stage, _, function = name.rpartition(".")
    home = importlib.import_module(f"kdcache.{stage}") if stage else kdcache
    documentation = getattr(home, function).__doc__
    assert documentation
    assert documentation.strip()


def test_every_module_says_what_it_is_for() -> None:
    for path in MODULES:
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_the_lazy_names_are_those_of_their_homes() -> None:
    for name, home in kdcache._HOMES.items():
        assert hasattr(importlib.import_module(home), name)
        assert getattr(kdcache, name) is getattr(importlib.import_module(home), name)


def test_no_public_name_is_hidden_by_a_module_of_the_same_name() -> None:
    # importing kdcache.x binds kdcache.x to the module, so a function of that name would be found once and then lost
    modules = {module.name for module in pkgutil.iter_modules(kdcache.__path__)}
    assert not set(kdcache.__all__) & modules
