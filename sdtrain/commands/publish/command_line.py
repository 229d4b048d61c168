"""The commands of this chapter as the command line has them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sdtrain.commands.front.answers import answer
from sdtrain.commands.front.command_line import Json
from sdtrain.commands.libraries import quiet_libraries
from sdtrain.training.watching.text import say, shell_word

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
About = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Say something of [export.about] now; can be given repeatedly."),
]


def card(
    run: RunFolder,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="The folder to write; default RUN/publish.")
    ] = None,
    repo: Annotated[str, typer.Option("--repo", metavar="OWNER/NAME", help="Where it will stand on the Hub.")] = "",
    set_: About = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder of an earlier card.")] = False,
    as_json: Json = False,
) -> None:
    """Write a folder for others: model card, weights, pictures, as the Hugging Face Hub and Civitai expect them."""
    quiet_libraries()
    from sdtrain.commands.publish.folder import publish

    done = publish(run, out, repo, set_ or [], force=force)
    if as_json:
        answer("card", {"written": [done.folder], "notes": done.notes})
    else:
        say(Console(), f"wrote {done.folder}", *(f"note: {note}" for note in done.notes))


def push(
    run: RunFolder,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="The repository, OWNER/NAME.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would go; the network is not used.")
    ] = False,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public; else it is private.")] = False,
    set_: About = None,
    as_json: Json = False,
) -> None:
    """Send the folder of `sdtrain card` to the Hugging Face Hub; the one command that sends anything."""
    quiet_libraries()
    from sdtrain.commands.publish.push import push as run_push

    done = run_push(run, repo, set_ or [], dry_run=dry_run, public=public)
    if as_json:
        answer("push", {"told": done.lines, "url": done.url, "dry_run": dry_run})
        return
    say(Console(), *done.lines, *([f"it is at {done.url}"] if done.url else []))
    if dry_run:
        say(Console(), f"send it: sdtrain push {shell_word(run)} {shell_word(repo)}")


def add_publish_commands(app: typer.Typer) -> None:
    """Add the commands of this chapter to the command line."""
    for command in (card, push):
        app.command()(command)
