"""Formats durations and two-column tables for the terminal; no torch."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table


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
        table.add_row(key, value)
    return table
