"""The commands. What each needs is imported when it runs."""

from importlib import import_module
from typing import Annotated

import typer

import fused_tdpo
from fused_tdpo.cli._console import show
from fused_tdpo.cli.check import check
from fused_tdpo.cli.plan import plan

app = typer.Typer(
    name="fused-tdpo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(plan)
app.command()(check)


def _version(wanted: bool) -> None:
    if wanted:
        show(fused_tdpo.__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", help="Show it.", callback=_version, is_eager=True)] = False,
) -> None:
    """TDPO and DPO losses in one pass over the logits: what they take, whether they are right here, what they do."""


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def demo(context: typer.Context) -> None:
    """Train a small model with the losses, and draw what they do. Options: fused-tdpo demo --help."""
    command = typer.Typer(pretty_exceptions_enable=False)
    command.command()(import_module("fused_tdpo.cli.demo").demo)
    command(context.args, prog_name="fused-tdpo demo")
