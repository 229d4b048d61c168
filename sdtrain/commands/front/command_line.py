"""The commands of this chapter as the command line has them, and how its help is laid out."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from sdtrain.commands.front.answers import answer, refusal
from sdtrain.errors import UserError
from sdtrain.training.watching.text import facts_table, say

Json = Annotated[bool, typer.Option("--json", help="Answer with one JSON object, for programs.")]

GROUPS = {
    "Train": ("init", "configs", "fit", "check", "plan", "view", "cache", "verify-resume"),
    "Look and use": ("report", "compare", "sample", "export", "runs", "info"),
    "Publish": ("card", "push"),
    "Files": ("merge", "extract", "resize", "import-kohya"),
    "Help": ("explain", "presets", "schema", "doctor"),
}
EXAMPLES = """\
Examples:
  sdtrain doctor                             is the machine ready?
  sdtrain init pictures/cat                  a first config for your pictures
  sdtrain check cat.toml                     every mistake, before training
  sdtrain fit cat.toml --set steps=500       train, with one setting changed
  sdtrain sample runs/cat --prompt "a photo" look at what was learnt
  sdtrain explain optimizer.d0               what a setting does
"""


class PlainHelp(TyperGroup):
    """Shows no Python."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command whose arguments are shown by their names alone, without the Python types behind them."""
        command = super().get_command(ctx, cmd_name)
        for parameter in command.params if command else ():
            if parameter.param_type_name == "argument":
                vars(parameter)["display_type_rich"] = _no_type
        return command


class GroupedHelp(PlainHelp):
    """Lists the commands by what they are for, then examples."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands in GROUPS, and any other under Others."""
        named = {name for names in GROUPS.values() for name in names}
        others = tuple(name for name in self.list_commands(ctx) if name not in named)
        for title, names in {**GROUPS, "Others": others}.items():
            commands = [(name, self.get_command(ctx, name)) for name in names]
            rows = [(name, command.get_short_help_str(formatter.width)) for name, command in commands if command]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples."""
        formatter.write_paragraph()
        formatter.write(EXAMPLES)


def _no_type(ctx: object) -> None:
    """What stands behind an argument's name in the help."""


def explain(
    key: Annotated[str, typer.Argument(metavar="[KEY]", help="A setting or a section; default all.")] = "",
    as_json: Json = False,
) -> None:
    """Say what a setting does, what it may be and what each preset makes of it."""
    from dataclasses import asdict

    from sdtrain.commands.front.settings import explained, lines_of, settings

    found = explained(key) if key else list(settings().values())
    if as_json:
        answer("explain", {"settings": [asdict(one) | {"presets": dict(one.presets)} for one in found]})
        return
    for setting in found:
        say(Console(), *(lines_of(setting) if key else [setting.key]))


def presets(as_json: Json = False) -> None:
    """List the presets of the optimizer and the values that each gives."""
    from typing import get_args

    from sdtrain.config.presets import preset_values
    from sdtrain.config.schema import OptimizerConfig
    from sdtrain.config.write import toml_value

    found = {name: preset_values(name) for name in get_args(OptimizerConfig.model_fields["preset"].annotation)}
    if as_json:
        answer("presets", {"presets": found})
        return
    for name, values in found.items():
        told = ", ".join(f"{key} = {toml_value(value)}" for key, value in values.items())
        say(Console(), f"{name}: {told}")


def schema() -> None:
    """Print the JSON schema of a config, for editors that know `#:schema FILE` in TOML."""
    from sdtrain.commands.front.settings import json_schema

    say(Console(), *json.dumps(json_schema(), indent=2).split("\n"))


def doctor(
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="Where runs are to be written; default here.")
    ] = Path(),
    as_json: Json = False,
) -> None:
    """Look at this machine: what is wrong, and what to do. Put its answer into reports of problems."""
    from sdtrain.commands.front.doctor import examine
    from sdtrain.commands.libraries import quiet_libraries

    quiet_libraries()
    found = examine(folder)
    if as_json:
        answer("doctor", {"ok": not found.wrong, "facts": found.facts, "wrong": found.wrong})
    else:
        Console().print(facts_table(found.facts))
        say(Console(), *(f"! {line}" for line in found.wrong or ()), *([] if found.wrong else ["nothing is wrong"]))
    raise typer.Exit(1 if found.wrong else 0)


def check_as_json(path: Path, overrides: list[str]) -> None:
    """Answer what `sdtrain check` finds; exit code 2 where something is wrong."""
    from sdtrain.commands.check import check_config

    told = Console(file=io.StringIO(), width=10_000)
    try:
        check_config(path, overrides, told)
    except UserError as error:
        answer("check", {**refusal(error), "told": []})
        raise typer.Exit(error.exit_code) from None
    lines = told.file.getvalue().splitlines() if isinstance(told.file, io.StringIO) else []
    answer("check", {"ok": True, "source": str(path), "problems": [], "told": lines})


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this chapter to the command line."""
    for command in (explain, presets, schema, doctor):
        app.command()(command)
