"""The command line, run as a person does."""

from __future__ import annotations

from typer.testing import CliRunner

from sdtrain.cli import app
from sdtrain.errors import UserError


def ran(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    error = result.exception
    found = error.exit_code if isinstance(error, UserError) else result.exit_code
    assert found == code, (result.output, error)
    return result.output + (error.text() if isinstance(error, UserError) else "")
