"""The commands about what is served: models, health."""

from __future__ import annotations

from typing import Annotated

import typer

from emberpc.cli.connection import with_client
from emberpc.cli.errors import CliError, ExitCode
from emberpc.cli.options import AsJson
from emberpc.cli.output import Column, print_fields, print_json, print_table
from emberpc.client import Client, Health, Model, NotFound


@with_client
def models(
    client: Client,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Show this one alone, in full.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the models served."""
    found = client.models() if name is None else [client.get_model(name)]
    if as_json:
        print_json(found)
    elif name is not None:
        print_fields(vars(found[0]))
    else:
        columns = [
            Column("name"),
            Column("task"),
            Column("state"),
            Column("dimensions", "right"),
            Column("labels", "right"),
            Column("max tokens", "right"),
            Column("variant"),
            Column("MB", "right"),
        ]
        print_table(columns, [_row(model) for model in found])


@with_client
def health(
    client: Client,
    service: Annotated[str, typer.Argument(metavar="SERVICE", help="One service; default: all of it.")] = "",
    as_json: AsJson = False,
) -> None:
    """Ask whether the server takes calls; the exit code is 3 if it does not."""
    try:
        status = client.health(service)
    except NotFound as error:
        raise CliError(f"the server has no service {service!r}", ExitCode.NOT_FOUND) from error
    if as_json:
        print_json([{"status": status.name}])
    else:
        print_fields({"status": status.name})
    if status is not Health.SERVING:
        raise CliError("the server answers, and takes no calls now", ExitCode.UNAVAILABLE)


def _row(model: Model) -> tuple[object, ...]:
    return (
        model.name,
        model.task,
        model.state,
        model.dimensions or "",
        len(model.labels) or "",
        model.max_tokens,
        model.variant,
        f"{model.size_bytes / 1e6:.1f}",
    )
