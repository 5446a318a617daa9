"""One YAML file per run, every key also settable as `key=value`; an unknown key is an error.

A stage declares its keys as a `Section`; this module reads text into one and says, for every mistake,
which key is wrong and what it could have been.
"""

import math
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from kdcache.errors import AccessError, ConfigError

MAX_CONFIG_BYTES = 1 << 20


class Section(BaseModel):
    """A group of keys: frozen, and refusing keys it does not declare, and numbers that are NaN or infinite."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


S = TypeVar("S", bound=Section)


def load_config(kind: type[S], path: Path | None = None, overrides: Sequence[str] = ()) -> S:
    """Return the section `kind` read from a YAML file, with `key.sub=value` overrides on top.

    Values of overrides are YAML: `targets.k=64`, `loss.temperature=2`, `targets.hidden=[{layer: final}]`.

    Raises:
        ConfigError: Unreadable YAML, an unknown key (the nearest is named), or a value that does not fit.
        AccessError: The file may not be read.
    """
    tree = read_yaml(path) if path else {}
    for override in overrides:
        _set(tree, override)
    return parse_config(kind, tree, where=str(path) if path else "--set")


def parse_config(kind: type[S], tree: dict[str, Any], *, where: str = "") -> S:
    """Return the section `kind` read from plain dictionaries, with errors as in `load_config`."""
    if odd := _not_finite(tree):
        raise ConfigError(f"The config does not fit: key {odd!r}: not a finite number.", where=where)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise _explain(kind, error, where) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Return a YAML file's top-level mapping, read with the safe loader.

    Raises:
        ConfigError: The file is missing, over 1 MiB, not YAML, or not a mapping.
        AccessError: The file may not be read.
    """
    try:
        data = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError(
            "There is no such config file.",
            where=str(path),
            hint="Give the path of a YAML file; README.md shows the smallest one.",
        ) from error
    except OSError as error:
        raise AccessError(f"The config cannot be read: {error.strerror}.", where=str(path)) from error
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError("The config is over 1 MiB.", where=str(path), hint="Give a YAML file, not data.")
    try:
        tree = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError("The config is not YAML.", where=f"{path}{line}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError("The config's top level is not a mapping of keys.", where=str(path))
    return tree


def _not_finite(value: Any, key: str = "") -> str:
    """Return the key of a number that is NaN or infinite, also in groups whose keys are not declared; or nothing."""
    if isinstance(value, float):
        return "" if math.isfinite(value) else key
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return next((found for name, one in pairs if (found := _not_finite(one, f"{key}.{name}".lstrip(".")))), "")


def _set(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r} is not key=value.", where="--set", hint="Write --set targets.k=64.")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"The value of {key!r} is not YAML.", where=f"--set {override}") from error
    *groups, last = key.split(".")
    for group in groups:
        tree = tree.setdefault(group, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{group!r} is a value, not a group of keys.", where=f"--set {override}")
    tree[last] = value


def _explain(kind: type[Section], error: ValidationError, where: str) -> ConfigError:
    lines, hint = [], ""
    for item in error.errors():
        key, fields = _place(kind, item)
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown key {key!r}")
            hint = hint or _suggest(str(item["loc"][-1]), fields)
        elif item["type"] == "missing":
            lines.append(f"key {key!r} is missing")
        else:
            message = item["msg"].removeprefix("Value error, ").rstrip(".")
            # what several groups break together has no key of its own
            lines.append(f"{f'key {key!r}: ' if key else ''}{message[:1].lower()}{message[1:]}")
    return ConfigError(f"The config does not fit: {'; '.join(lines)}.", where=where, hint=hint)


def _place(kind: type[Section], item: ErrorDetails) -> tuple[str, dict[str, Any]]:
    """Return the key that an error is about, as a user wrote it, and the keys that are known beside it."""
    beside: dict[str, Any] = dict(kind.model_fields)
    kept, inside = [], beside
    for number, part in enumerate(item["loc"]):
        unknown = item["type"] == "extra_forbidden" and number == len(item["loc"]) - 1
        if isinstance(part, str) and inside and part not in inside and not unknown:
            continue  # which member of a union was tried
        kept.append(str(part))
        beside = inside
        if isinstance(part, str) and part in inside:
            sections = [one.model_fields for one in _sections(inside[part].annotation)]
            inside = {name: found for one in sections for name, found in one.items()}
    return ".".join(kept), beside


def _suggest(name: str, fields: dict[str, Any]) -> str:
    close = get_close_matches(name, fields, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Known keys: {', '.join(sorted(fields))}."


def _sections(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [found for inner in getattr(annotation, "__args__", ()) for found in _sections(inner)]
