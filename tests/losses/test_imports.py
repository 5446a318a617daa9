"""What the losses bring into memory, and which words they use."""

import ast
import subprocess
import sys
from pathlib import Path

import kdcache.losses

ROOT = Path(kdcache.losses.__file__).parent
FILES = sorted([*ROOT.glob("*.py"), *(ROOT / "divergences").glob("*.py")])
PROGRAM = """
import importlib, pkgutil, sys
import kdcache.losses
for module in pkgutil.walk_packages(kdcache.losses.__path__, "kdcache.losses."):
    importlib.import_module(module.name)
print(*(name for name in sys.modules if name.startswith(("kdcache.teachers", "kdcache.capture", "transformers"))))
"""


def test_losses_bring_no_teacher_into_memory() -> None:
    finished = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert finished.stdout.split() == []


def test_divergences_and_the_output_layer_know_no_temperature() -> None:
    allowed = {"tails.py", "exact.py"}
    for file in FILES:
        names = {node.arg for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.arg)}
        assert file.name in allowed or "temperature" not in names, file.name
