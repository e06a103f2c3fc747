"""The commands `emberpc models …`, `emberpc health` and `emberpc info`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from emberpc.cli.connection import with_client
from emberpc.cli.errors import CliError, ExitCode
from emberpc.cli.options import AsJson
from emberpc.cli.output import Column, note, print_fields, print_json, print_table
from emberpc.client import Classifier, Client, Health, Model, NotFound


class _ShowByDefault(TyperGroup):
    """Group of commands that runs `models …` as `models show …` if no subcommand is given."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments, with `show` inserted before them unless they start with a subcommand or --help."""
        if not (args and (args[0] in self.commands or args[0] == "--help")):
            args = ["show", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_ShowByDefault, help="List the served models; show, load, reload or unload a model. `models NAME` shows one."
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the served model.")]


@app.command()
@with_client
def show(
    client: Client,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Show all fields of this model.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the served models, or show one model."""
    if name is not None:
        _show(client.get_model(name), as_json)
    elif as_json:
        print_json(client.models())
    else:
        columns = [
            Column("name"),
            Column("task"),
            Column("state"),
            Column("dimensions", "right"),
            Column("labels", "right"),
            Column("max tokens", "right"),
            Column("variant"),
            Column("engine"),
            Column("MB", "right"),
        ]
        found = client.models()
        print_table(columns, [_row(model) for model in found])
        if not found:
            note("no model is served; start the server with --model NAME=DIR")


@app.command()
@with_client
def classifiers(
    client: Client,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Show all fields of this classifier.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the classifiers, or show one: labels, thresholds, calibration, quality."""
    if name is not None:
        classifier = client.get_classifier(name)
        if as_json:
            print_json([classifier])
        else:
            print_fields(_fields(classifier))
    elif as_json:
        print_json(client.classifiers())
    else:
        columns = [
            Column("name"),
            Column("kind"),
            Column("labels", "right"),
            Column("multi-label"),
            Column("base model"),
        ]
        rows = [
            (each.name, each.kind, len(each.labels), "yes" if each.multi_label else "no", each.base_model)
            for each in client.classifiers()
        ]
        print_table(columns, rows)
        if not rows:
            note("no classifier is served; make one with `emberpc export classifier`")


@app.command()
@with_client
def load(
    client: Client,
    name: Name,
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="The bundle's folder, relative to the server's --models-dir.")
    ],
    variant: Annotated[
        str, typer.Option(help="ONNX variant to serve; default: the server's --variant for this model, else the first.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Load a model from a folder on the server's host, and serve it under a new name."""
    _show(client.load_model(name, path, variant=variant, progress=_tell), as_json)


@app.command()
@with_client
def reload(
    client: Client,
    name: Name,
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="Another folder, relative to the server's --models-dir; default: the folder of the model.",
        ),
    ] = "",
    variant: Annotated[str, typer.Option(help="ONNX variant to serve; default: the variant that is served now.")] = "",
    as_json: AsJson = False,
) -> None:
    """Replace a model by the one now in its folder, or in another folder. Calls in flight finish on the old model."""
    _show(client.reload_model(name, path, variant=variant, progress=_tell), as_json)


@app.command()
@with_client
def unload(client: Client, name: Name) -> None:
    """Stop serving a model, and wait until the model's calls in flight are done."""
    client.unload_model(name)
    note(f"unloaded the model {name}")


@with_client
def health(
    client: Client,
    service: Annotated[str, typer.Argument(metavar="SERVICE", help="gRPC service; default: the whole server.")] = "",
    as_json: AsJson = False,
) -> None:
    """Check whether the server accepts calls. Exit code 3: it does not, or no server answers; 4: unknown service."""
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


@with_client
def info(client: Client, as_json: AsJson = False) -> None:
    """Show the server's version, limits and features."""
    found = client.server_info()
    if as_json:
        print_json([found])
    else:
        print_fields({"version": found.version, "features": ", ".join(found.features), **found.limits})


def _tell(stage: str) -> None:
    if stage != "ready":  # the model that is printed next shows that
        note(f"{stage} …")


def _show(model: Model, as_json: bool) -> None:
    if as_json:
        print_json([model])
    else:
        print_fields(vars(model))


def _fields(classifier: Classifier) -> dict[str, object]:
    """Return the fields of a classifier to print.

    Each label has its description, if any. In place of the model are its fingerprint and the classifier's fingerprint.
    Fields of classifiers that are made from examples are left out if they are empty.
    """
    labels = [f"{label.name}: {label.description}" if label.description else label.name for label in classifier.labels]
    model = classifier.model
    fields = {**vars(classifier), "labels": tuple(labels)}
    for name in ("collection", "strategy", "example_count"):
        if not fields[name]:
            del fields[name]
    del fields["model"]
    return {
        **fields,
        "model_fingerprint": model.fingerprint,
        "classifier_fingerprint": model.classifier_fingerprint,
    }


def _row(model: Model) -> tuple[object, ...]:
    return (
        model.name,
        model.task,
        model.state,
        model.dimensions or "",
        len(model.labels) or "",
        model.max_tokens,
        model.variant,
        f"{model.engine} {model.precision}".strip(),
        f"{model.size_bytes / 1e6:.1f}",
    )
