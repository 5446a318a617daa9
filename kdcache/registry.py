"""Find a plug-in by name: the module of that name in the family's package, then an entry point.

A family is a package such as `kdcache.codecs`. A plug-in is one module in it that binds `plugin`;
third parties offer theirs under the entry-point group of the family's dotted name.
"""

import importlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache, partial
from importlib.metadata import entry_points
from typing import Any, TypeVar

from kdcache.errors import ConfigError

T = TypeVar("T")


def attribute(path: str) -> Any:
    """Return what `module:attribute` names; the working folder's own modules are found too, after all others.

    Raises:
        ImportError, AttributeError, ValueError: There is no such module or attribute.
    """
    module, _, name = path.partition(":")
    here = os.getcwd()
    # only here, where a user has named a module: a package that is missing is not to be found in any folder
    sys.path.append(here)
    try:
        return getattr(importlib.import_module(module), name)
    finally:
        sys.path.remove(here)


def names(family: str) -> list[str]:
    """Return the names of all plug-ins of a family, sorted; imports none of them."""
    package = importlib.import_module(family)
    own = {module.name for module in pkgutil.iter_modules(package.__path__) if module.name[0] != "_"}
    return sorted(own | {point.name for point in entry_points(group=family)})


@cache
def find(family: str, name: str) -> Any:
    """Return the plug-in `name` of a family; looked for once a process.

    Raises:
        ConfigError: No plug-in has that name; the message lists those that exist.
    """
    package = importlib.import_module(family)
    if any(module.name == name for module in pkgutil.iter_modules(package.__path__)):
        return importlib.import_module(f"{family}.{name}").plugin
    for point in entry_points(group=family, name=name):
        return point.load()
    known = names(family)
    close = get_close_matches(name, known, n=1)
    raise ConfigError(
        f"There is no {family.rsplit('.', 1)[-1].rstrip('s')} named {name!r}.",
        hint=f"Did you mean {close[0]!r}?" if close else f"Choose one of: {', '.join(known)}.",
    )


def bound(function: Callable[..., T], what: str, given: int, parameters: dict[str, Any]) -> Callable[..., T]:
    """Return a plug-in's function with its parameters set.

    Args:
        function: The function.
        what: Names it in the error, such as "divergence jsd".
        given: Arguments that whoever calls it gives, which are no parameters.
        parameters: By name.

    Raises:
        ConfigError: It has no such parameter.
    """
    accepted = list(inspect.signature(function).parameters)[given:]
    if unknown := sorted(set(parameters) - set(accepted)):
        raise ConfigError(
            f"The {what} has no parameter {', '.join(map(repr, unknown))}.",
            hint=f"Its parameters are: {', '.join(accepted) or 'none'}.",
        )
    return partial(function, **parameters)
