"""Checkpoints: safetensors for numbers, JSON for the rest, a digest for each; never a pickle.

A checkpoint is a folder that appears as a whole under its final name. The last two are kept; a damaged one is passed
over for the one before.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdcache.errors import CorruptObjectError, MismatchError
from kdcache.fingerprint import canonical_json, digest_file
from kdcache.store.disk import storage_errors

KEEP = 2
FILES = ("model.safetensors", "optimizer.safetensors", "random.safetensors")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        folder: Where.
        step: Optimiser steps done.
        state: The run's JSON state.
    """

    folder: Path
    step: int
    state: dict[str, Any]


def save(root: Path, step: int, state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    """Write a checkpoint durably and drop those before the last two; return its folder.

    Args:
        root: The run's folder of checkpoints.
        step: Optimiser steps done.
        state: JSON-ready.
        model: Whose parameters and buffers are kept.
        optimizer: Whose state is kept.
    """
    final = root / f"step-{step:08d}"
    temporary = root / f".step-{step:08d}.partial"
    with storage_errors(final):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        tensors, groups = _flatten(optimizer)
        save_file(_distinct(model), temporary / FILES[0])
        save_file(tensors, temporary / FILES[1])
        save_file(_random_state(), temporary / FILES[2])
        document = {
            "step": step,
            "state": state,
            "groups": groups,
            "digests": {name: digest_file(temporary / name) for name in FILES},
        }
        (temporary / "state.json").write_bytes(canonical_json(document))
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        temporary.replace(final)
    for old in _folders(root)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def latest(root: Path, identity: dict[str, Any]) -> Checkpoint | None:
    """Return the newest checkpoint that is whole, or None.

    Args:
        root: The run's folder of checkpoints.
        identity: Members of the state that must be equal: what run it belongs to.

    Raises:
        MismatchError: It belongs to another run.
    """
    for folder in reversed(_folders(root)):
        try:
            document = _verified(folder)
        except CorruptObjectError:
            continue
        state = document["state"]
        if wrong := [key for key, value in identity.items() if state.get(key) != value]:
            raise MismatchError(
                f"The folder holds checkpoints of another run: {', '.join(wrong)} differ.",
                where=str(folder),
                hint="Choose another --out, or go back to the config and store the run began with.",
            )
        return Checkpoint(folder, document["step"], state)
    return None


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's numbers back in place, and torch's random state.

    Raises:
        CorruptObjectError: It does not fit the model.
    """
    weights = load_file(checkpoint.folder / FILES[0])
    distinct = set(_distinct(model))
    if set(weights) != distinct:
        raise CorruptObjectError("The checkpoint's weights are not the student's.", where=str(checkpoint.folder))
    model.load_state_dict(weights, strict=False)  # tied weights stand once, under their first name
    groups = json.loads((checkpoint.folder / "state.json").read_bytes())["groups"]
    optimizer.load_state_dict(_unflatten(load_file(checkpoint.folder / FILES[1]), groups))
    random = load_file(checkpoint.folder / FILES[2])
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])


def _folders(root: Path) -> list[Path]:
    return sorted(root.glob("step-*")) if root.is_dir() else []


def _verified(folder: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads((folder / "state.json").read_bytes())
        whole = all(digest_file(folder / name) == document["digests"][name] for name in FILES)
    except Exception as error:
        raise CorruptObjectError(f"The checkpoint is damaged: {error}.", where=str(folder)) from error
    if not whole:
        raise CorruptObjectError("The checkpoint is damaged: a digest differs.", where=str(folder))
    return document


def _distinct(model: nn.Module) -> dict[str, Tensor]:
    seen: set[int] = set()
    kept = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen and tensor.numel():
            continue
        seen.add(tensor.data_ptr())
        kept[name] = tensor.detach().cpu().contiguous()
    return kept


def _flatten(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    state = optimizer.state_dict()
    tensors = {
        f"{number}.{key}": torch.as_tensor(value).detach().cpu().contiguous()
        for number, entries in state["state"].items()
        for key, value in entries.items()
    }
    return tensors, state["param_groups"]


def _unflatten(tensors: dict[str, Tensor], groups: list[dict[str, Any]]) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = tensor
    return {"state": state, "param_groups": [{**group, "betas": tuple(group["betas"])} for group in groups]}


def _random_state() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


__all__ = ["Checkpoint", "SafetensorError", "latest", "restore", "save"]
