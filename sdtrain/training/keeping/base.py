"""The digest of the model that a run trains: of its weights and of what it says about itself. No torch."""

from __future__ import annotations

import json

from sdtrain.errors import user_error
from sdtrain.files.hashes import digest_of, file_digest
from sdtrain.files.header import Header
from sdtrain.files.remembered import RememberedDigests
from sdtrain.models.checkpoints.inspect import OpenedModel


def base_digest(opened: OpenedModel, remembered: RememberedDigests) -> str:
    """Return the digest of a model, whatever its files are called and wherever they lie.

    It holds all tensors of all networks with their names, types and shapes, the noise schedule and what no caption is;
    not what else a file says of itself, its title for one. Each file is read once, and not again until it changes.
    Raises UserError when one cannot be read.
    """
    parts = {part: [_file(header, remembered) for header in headers] for part, headers in opened.headers.items()}
    vae = [] if opened.vae is None else [_file(header, remembered) for header in opened.vae.headers]
    facts = {"parts": parts, "vae": vae, "scheduler": dict(opened.scheduler), "no caption": opened.no_caption}
    return digest_of(json.dumps(facts, sort_keys=True).encode())


def _file(header: Header, remembered: RememberedDigests) -> str:
    first = min((entry.start for entry in header.entries.values()), default=0)
    places = {
        name: (entry.dtype, entry.shape, entry.start - first, entry.end - first)
        for name, entry in header.entries.items()
    }
    try:
        data = remembered.of(header.path, "tensors", lambda path: file_digest(path, first))
    except OSError as error:
        raise user_error(str(header.path), "model.path", f"cannot be read: {error.strerror or error}") from None
    return digest_of(json.dumps(places, sort_keys=True).encode()) + data
