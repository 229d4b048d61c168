"""A model card as the Hugging Face Hub shows it: Markdown behind a head of YAML, out of a template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from sdtrain.commands.publish.gallery import Shown
from sdtrain.errors import printable
from sdtrain.families.family import Family
from sdtrain.families.readers import Reader

LICENCES = frozenset(
    {
        *("apache-2.0", "mit", "openrail", "openrail++", "creativeml-openrail-m", "bigscience-openrail-m"),
        *("cc0-1.0", "cc-by-4.0", "cc-by-3.0", "cc-by-2.0", "cc-by-sa-4.0", "cc-by-sa-3.0", "cc-by-nc-4.0"),
        *("cc-by-nc-3.0", "cc-by-nc-sa-4.0", "cc-by-nc-sa-3.0", "cc-by-nc-nd-4.0", "cc-by-nd-4.0", "cc"),
        *("gpl-3.0", "agpl-3.0", "lgpl-3.0", "unlicense", "wtfpl", "bsd-3-clause", "mpl-2.0"),
    }
)
"""The licences that the Hub knows by these names; any other is `other`, with a name of its own."""
SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+!|~$&])")
"""What means something in Markdown, or in the HTML that Markdown lets through."""
LINE_START = re.compile(r"^(\s*|\s*\d+)([-=+.)])")
"""What makes a line a list, a rule or a heading."""


@dataclass(frozen=True)
class Card:
    """Everything that a card says."""

    title: str
    file: str
    """The name of the weights file."""
    family: Family
    adapter: bool
    """Whether the file holds adapters rather than a whole model."""
    readers: Sequence[Reader]
    base_id: str
    """The base model's id on the Hub; empty where it has none."""
    author: str
    licence: str
    description: str
    usage: str
    tags: Sequence[str]
    triggers: Sequence[str]
    pictures: Sequence[Shown]
    sampling: str
    prompt: str
    facts: Mapping[str, str]
    settings: str
    """The settings of the run as TOML, without the paths of this machine."""
    repository: str


def card_text(card: Card) -> str:
    """Return the card as Markdown. What people wrote is shown letter by letter: it is neither Markdown nor YAML."""
    known = card.licence.lower() in LICENCES
    slug = re.sub(r"[^a-z0-9.]+", "-", card.licence.lower()).strip("-.")
    words = [card.family.title.lower().replace(" ", "-"), "text-to-image", "diffusers"]
    words += ["lora", "template:sd-lora"] if card.adapter else []
    told = vars(card) | {"tags": list(dict.fromkeys([*words, *card.tags]))}
    text = _template().render(
        told,
        licence_id=card.licence.lower() if known else "other" if card.licence else "",
        licence_name="" if known else slug,
        pipeline=card.family.words.pipeline,
        stem=card.file.removesuffix(".safetensors"),
        seeds=", ".join(dict.fromkeys(shown.seed for shown in card.pictures)),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("sdtrain.commands.publish", ""),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"text": markdown, "paragraphs": paragraphs, "yaml": quoted, "python": quoted}
    return environment.get_template("card.md")


def markdown(text: str) -> str:
    """Return a text on one line that Markdown shows letter by letter, in a cell of a table too."""
    escaped = SPECIAL.sub(r"\\\1", printable(text)).replace("://", ":\\//")
    return LINE_START.sub(r"\1\\\2", escaped)


def paragraphs(text: str) -> str:
    """Return a text whose lines Markdown shows as paragraphs, letter by letter."""
    return "\n\n".join(markdown(line.strip()) for line in text.splitlines() if line.strip())


def quoted(text: str) -> str:
    """Return a text in double quotes, as YAML and Python read it."""
    return json.dumps(printable(text), ensure_ascii=False)
