"""What a merged file is made of, as its header says it: names, hashes and weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

from sdtrain.adapters.shares import Share
from sdtrain.families.metadata import MERGED_KEY
from sdtrain.families.modelspec import KEPT, spoken
from sdtrain.files.hashes import CHUNK_BYTES
from sdtrain.files.header import Header

ONE = Share()


@dataclass(frozen=True)
class Part:
    """A file that was merged: its name, the SHA-256 of its tensors (empty for a folder) and how often it counts."""

    name: str
    hash: str
    share: Share = ONE

    def text(self) -> str:
        """Return it in one line without commas, which part one from another."""
        weight = "" if self.share == ONE else " x " + self.share.text().replace(",", " ")
        return f"{self.name.replace(',', '_')}{f' 0x{self.hash}' if self.hash else ''}{weight}"


def part_of(header: Header, share: Share = ONE) -> Part:
    """Return a file as a part of what is made of it. Its tensors are hashed: what headers claim may be of another."""
    return Part(header.path.name, data_hash(header), share)


def data_hash(header: Header) -> str:
    """Return the SHA-256 of a file's tensors, by which other tools know it. Raises OSError."""
    digest, buffer = sha256(), bytearray(CHUNK_BYTES)
    with header.path.open("rb", buffering=0) as file:
        file.seek(min((entry.start for entry in header.entries.values()), default=0))
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def made_of_entries(parts: Sequence[Part]) -> dict[str, str]:
    """Return the header entries that tell what a file was merged of, for people and for programs."""
    told = [{"name": part.name, "hash": part.hash, "weight": part.share.text()} for part in parts]
    words = spoken(merged_from=", ".join(part.text() for part in parts))
    return words | {MERGED_KEY: json.dumps(told, ensure_ascii=False)}


def joined_words(sources: Sequence[Mapping[str, str]], names: Sequence[str] = KEPT) -> dict[str, str]:
    """Return what the authors of several files say, without saying anything twice; the thumbnail is the first's."""
    found = {}
    for name in names:
        texts = [source.get(f"modelspec.{name}", "").strip() for source in sources]
        if name in ("tags", "trigger_phrase"):
            texts = [word.strip() for text in texts for word in text.split(",")]
        texts = list(dict.fromkeys(text for text in texts if text))
        found[name] = "".join(texts[:1]) if name == "thumbnail" else ", ".join(texts)
    return spoken(**found)
