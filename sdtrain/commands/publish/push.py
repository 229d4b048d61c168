"""`sdtrain push`: the folder of a run to the Hugging Face Hub, in one commit. Nothing else here uses the network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from sdtrain.commands.publish.folder import FOLDER, publish
from sdtrain.commands.run_facts import size_text
from sdtrain.errors import printable, user_error
from sdtrain.models.checkpoints.hub import is_offline


@dataclass(frozen=True)
class Pushed:
    """What went, or would go, to the Hub."""

    lines: tuple[str, ...]
    url: str = ""
    """Where it is now; empty where nothing was sent."""


def push(run: Path, repository: str, overrides: Sequence[str], *, dry_run: bool, public: bool) -> Pushed:
    """Send the folder of a run to a repository of the Hub; it is made first where it is not there.

    A repository that is not there yet is made, for its owner's eyes alone unless `public`. dry_run: only say what would
    go. Raises UserError, with nothing sent, where there is no token, the network is off or the Hub refuses it.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repository, re.ASCII):
        raise user_error("push", "REPO", f"{repository} is no repository of the Hub; write owner/name")
    token = None if dry_run else _token()
    folder, notes = run / FOLDER, tuple[str, ...]()
    if folder.is_dir() and overrides:
        what = f"would change nothing: {folder} is sent as it is; `sdtrain card RUN --force` writes it anew"
        raise user_error("push", "--set", what)
    if not folder.is_dir():
        done = publish(run, None, repository, overrides, force=False)
        notes = done.notes
    files = files_of(folder)
    total = sum(path.stat().st_size for path in files)
    lines = [
        *(f"note: {note}" for note in notes),
        *(f"{path.relative_to(folder)}  {size_text(path.stat().st_size)}" for path in files),
        f"{len(files)} files, {size_text(total)}, from {folder} to {repository}"
        + ("" if public else ", private if it is new"),
    ]
    if token is None:
        return Pushed((*lines, "nothing was sent: this was a dry run"))
    return Pushed(tuple(lines), _send(folder, files, repository, token, public=public))


def files_of(folder: Path) -> list[Path]:
    """Return the files that are sent, in their order; hidden ones stay. Raises UserError for a link or a device."""
    found = []
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise user_error(str(folder), str(path.relative_to(folder)), "is a link or no file; only files are sent")
        found += [path] if path.is_file() else []
    if not found:
        raise user_error(str(folder), "files", "there are none; `sdtrain card RUN --force` writes them")
    return found


def _token() -> str:
    if is_offline():
        raise user_error("push", "network", "is off (HF_HUB_OFFLINE); unset it, or add --dry-run")
    from huggingface_hub import get_token

    token = get_token()
    if token is None:
        raise user_error("push", "token", "there is none on this machine: run `hf auth login`, or set HF_TOKEN")
    return token


def _send(folder: Path, files: Sequence[Path], repository: str, token: str, *, public: bool) -> str:
    """Send files in one commit; return where they are. Raises UserError; the token is in no message."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    api = huggingface_hub.HfApi(token=token)
    operations = [huggingface_hub.CommitOperationAdd(path.relative_to(folder).as_posix(), str(path)) for path in files]
    of_the_client = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)  # which differs with the version
    refusals: tuple[type[Exception], ...] = (*of_the_client, ValueError, RuntimeError)  # the last for large files
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        done = api.create_commit(repository, operations, commit_message="Upload with sdtrain")
    except refusals as error:
        cause = f" {error.__cause__}" if error.__cause__ is not None else ""
        told = printable(f"{error}{cause}".replace(token, "***"))[:300]
        what = f"did not take it: {told}; look at the token's rights and at the name, and try again"
        raise user_error(repository, "Hugging Face Hub", what) from None
    return str(done.commit_url)
