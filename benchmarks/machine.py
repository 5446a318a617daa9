"""What stands at the head of every results file: machine, versions, commit."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch


def heading(title: str) -> str:
    """Return the first lines of a results file."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "zarr", "numpy"))
    return (
        f"# {title}\n\n"
        f"{processor}, {torch.get_num_threads()} threads, {accelerator}; Python {platform.python_version()}, {packages}; "
        f"commit {commit.stdout.strip() or 'unknown'}.\n"
    )
