"""Arguments and options that commands share, and how a command prints its result."""

import json
from typing import Annotated, Any

import typer

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set any key of the config; may be repeated."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON value.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
StorePath = Annotated[
    str, typer.Argument(metavar="STORE", help="Folder of a store, or URL of a shared one (hf, s3, gs, az, https).")
]
Columns = Annotated[
    str | None,
    typer.Option("--columns", metavar="A,B", help="Optional columns to keep; inputs and targets always are."),
]
Top = Annotated[
    int | None, typer.Option("--top", min=1, help="Entries to keep of each head; the others join the tail.")
]
Shards = Annotated[str | None, typer.Option("--shards", metavar="0:10", help="Shards to take.")]
Samples = Annotated[str | None, typer.Option("--samples", metavar="0:1000", help="Samples to take, within the shards.")]


def print_result(result: Any, as_json: bool, show: Any) -> None:
    """Print a JSON-ready result: as JSON, or as a person reads it."""
    if as_json:
        typer.echo(json.dumps(result, indent=2, ensure_ascii=False, default=str))
    else:
        show(result)
