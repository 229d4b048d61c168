"""What a person is shown: lines, tables of two columns, durations, commands to copy; no torch.

Everything that is shown in the terminal goes through `say`, `facts_table` or `hand_out`, and nothing of it is read as
rich's markup, as an emoji's name or as an escape code: paths, prompts and metadata are other people's.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sdtrain.errors import printable


def say(console: Console, *lines: str) -> None:
    """Print lines as they are, each on one line of its own."""
    for line in lines:
        console.print(shown(line), soft_wrap=True)


def hand_out(document: str) -> None:
    """Print a document for other programs, such as a config, as it is.

    In a terminal, where a person reads it, what could steer that is spelt out.
    """
    if sys.stdout.isatty():
        document = "\n".join(printable(line) for line in document.split("\n"))
    sys.stdout.write(document)
    sys.stdout.flush()


def shown(text: str) -> Text:
    """Return a text for rich that is shown letter by letter."""
    return Text(printable(text))


def shell_word(path: Path | str) -> str:
    """Return a path as one word of a command that can be copied into a shell."""
    return shlex.quote(str(path))


def duration(seconds: float) -> str:
    """Return seconds as a person says them: 42 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def facts_table(rows: Mapping[str, str]) -> Table:
    """Return a table without lines of two columns, names and values."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in rows.items():
        table.add_row(shown(key), shown(value))
    return table
