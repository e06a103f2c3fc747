"""Options that several commands share, and the code that adds options to commands."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from inspect import Parameter
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from emberpc.cli.errors import CliError

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON Lines: one object for each result.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the collection.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing file or folder.")]
WithDetails = Annotated[
    bool,
    typer.Option(
        "--details",
        help="Also print on stderr, as a line of JSON for each response: model, times, tokens of the texts, missing "
        "ids, sequence number and durability of a write.",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts or records of one request.")]
#: Default of --batch-size: texts or records of one request. With 256 texts of 200 tokens, a busy host of two cores may
#: not answer within the default --timeout of 30 s. The streams of the Python clients have the same default.
DEFAULT_BATCH = 64
Where = Annotated[
    str | None,
    typer.Option(
        metavar="FILTER",
        help="Only records whose metadata matches, such as 'lang = \"en\" and year >= 2020'; also in (…), starts with, "
        "exists, not, or, ( ).",
    ),
]


class OnceCommand(TyperCommand):
    """A command that refuses an option that is repeated but has a single value. Typer would use the last value.

    Its help is plain text. In a terminal of 80 columns, the tables of Rich would truncate names of options and
    variables.
    """

    def __init__(self, name: str | None, **settings: Any) -> None:
        super().__init__(name, **{**settings, "rich_markup_mode": None})

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; fail with a usage error if an option that has a single value is repeated."""
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for option in given:
            keeps_one = isinstance(option, TyperOption) and not (option.multiple or option.is_flag or option.count)
            if keeps_one and given.count(option) > 1:
                ctx.fail(f"Option {option.opts[0]!r} is given {given.count(option)} times; give it once")
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the help of arguments and options to `formatter`, in a section for each panel."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            is_option = isinstance(parameter, TyperOption)
            panel = getattr(parameter, "rich_help_panel", None) or ("Options" if is_option else "Arguments")
            if (record := parameter.get_help_record(ctx)) is not None:
                sections.setdefault(panel, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def completer(names: Sequence[str]) -> Callable[[str], list[str]]:
    """Return the completion of an option that is one of `names`, or a list of names with commas between them."""

    def complete(incomplete: str) -> list[str]:
        before, comma, start = incomplete.rpartition(",")
        return [f"{before}{comma}{name}" for name in names if name.startswith(start)]

    return complete


def listed(option: str, values: Sequence[str]) -> list[str]:
    """Return the items of an option that may be repeated and may hold several comma-separated items.

    Args:
        option: name of the option, for messages.
        values: values of the option.

    Raises:
        CliError: an item is empty or repeated.
    """
    items = [item.strip() for value in values for item in value.split(",")]
    for item in items:
        if not item:
            raise CliError(f"{option} has an empty item; put one comma between two items")
        if items.count(item) > 1:
            raise CliError(f"{option} has {item} twice; give it once")
    return items


def add_options(
    command: Callable[..., None],
    options: Sequence[Parameter],
    run: Callable[[dict[str, Any], dict[str, Any]], None],
) -> Callable[..., None]:
    """Return a command with more options. Typer reads them from the signature.

    Args:
        command: the command. `run` supplies its first parameter, which is not an option.
        options: the options to add, as keyword-only parameters.
        run: called with the values of the added options by name, and the values of the command's other parameters by
            name. It must call the command.
    """
    # Annotations are texts that use names of the command's module. Typer would evaluate them with the names of this
    # module, where `with_options` is defined. `eval_str` evaluates them with the names of the command's module.
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    names = {option.name for option in options}

    @functools.wraps(command)
    def with_options(**values: Any) -> None:
        run(
            {name: value for name, value in values.items() if name in names},
            {name: value for name, value in values.items() if name not in names},
        )

    parameters = [*(parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in own), *options]
    # `functools.wraps` set `__wrapped__`, from which Typer would read the signature without the added options.
    del with_options.__dict__["__wrapped__"]
    with_options.__dict__["__signature__"] = inspect.Signature(parameters)
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_options
