"""The command line: arguments in, library calls, results out. No logic lives here.

Results go to standard output (as one JSON value with `--json`), progress and errors to standard error.
Exit codes are those of `kdcache.errors`; torch is imported only by the commands that compute with it.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from kdcache import __version__
from kdcache.cli import runs, stores
from kdcache.errors import KdcacheError

app = typer.Typer(
    name="kdcache",
    help="Run the teacher once, store what it knew, distil any number of students from the store.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

COMMANDS: dict[str, Callable[..., None]] = {
    "capture": runs.capture,
    "generate": runs.generate,
    "train": runs.train,
    "sweep": runs.sweep,
    "eval": runs.evaluate,
    "export": runs.export,
    "chain": runs.chain,
    "compare": runs.compare,
    "demo": runs.demo,
    "info": stores.info,
    "head": stores.head,
    "verify": stores.verify,
    "push": stores.push,
    "pull": stores.pull,
    "select": stores.select,
    "merge": stores.merge,
    "add": stores.add,
    "convert": stores.convert,
}

for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if debug:
        os.environ["KDCACHE_DEBUG"] = "1"
    if version:
        typer.echo(f"kdcache {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; errors of kdcache end in one message and their exit code, never a traceback."""
    try:
        app()
    except KdcacheError as error:
        if os.environ.get("KDCACHE_DEBUG"):
            raise
        if "--json" in sys.argv:
            typer.echo(json.dumps(error.as_dict(), ensure_ascii=False))
        else:
            typer.echo(str(error), err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


if __name__ == "__main__":
    main()
