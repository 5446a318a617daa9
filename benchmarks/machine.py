"""What stands at the head of every results file: machine, versions, commit."""

import subprocess
from importlib.metadata import version

import torch

from kdcache.process import machine


def heading(title: str) -> str:
    """Return the first lines of a results file."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    host = machine()
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "zarr", "numpy"))
    return (
        f"# {title}\n\n"
        f"{host['processor']}, {torch.get_num_threads()} threads, {accelerator}; Python {host['python']}, {packages}; "
        f"commit {commit.stdout.strip() or 'unknown'}.\n"
    )
