"""The environment of scripts/quickstart and scripts/test: `.venv` beside the sources, exact versions, made once."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv"
MADE_FROM = ("pyproject.toml", "constraints.txt")


def ready(*extras: str) -> Path:
    """Make `.venv` and install sdtrain with these extras, unless that is done already; return its Python's path."""
    if sys.version_info < (3, 11):  # noqa: UP036 - the reader may have started it with an older Python
        sys.exit(f"sdtrain needs Python 3.11 or newer; this is {sys.version.split()[0]} ({sys.executable})")
    python = FOLDER / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = FOLDER / "-".join(["installed", *sorted(extras)])
    wanted = _fingerprint()
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return python
    if not python.exists():
        print(f"making {FOLDER}", flush=True)
        venv.create(FOLDER, with_pip=True)
    print("installing sdtrain and what it needs (some minutes the first time)", flush=True)
    target = f".[{','.join(extras)}]" if extras else "."
    command = [str(python), "-m", "pip", "install", "--quiet", "--constraint", "constraints.txt", "--editable", target]
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        sys.exit(f"the installation failed; what pip said stands above. Once it is mended, run {sys.argv[0]} again")
    stamp.write_text(wanted)
    return python


def _fingerprint() -> str:
    digest = hashlib.sha256(sys.version.encode())
    for name in MADE_FROM:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()
