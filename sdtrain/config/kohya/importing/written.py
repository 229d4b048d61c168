"""Writes a config with comments: beside each setting where it comes from, below them what became of the others."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sdtrain.config.kohya.importing.findings import Became
from sdtrain.config.kohya.importing.options import Option
from sdtrain.config.kohya.importing.outcomes import Outcome, Sort
from sdtrain.config.paths import location_of, toml_key
from sdtrain.config.schema import Config
from sdtrain.config.write import toml_value

_WIDTH = 118
_LONGEST_VALUE = 40
_SECRETS = ("wandb_api_key", "huggingface_token")
_HEADINGS: Mapping[Sort, str] = {
    "unreadable": "Could not be read; set these by hand:",
    "unknown": "Not known; look these up where the file comes from:",
    "no counterpart": "No counterpart here:",
    "not needed": "Not needed here:",
    "off": "Off, empty, or as if they were not there, so that nothing is lost:",
}


def config_text(sources: Sequence[str], settings: Sequence[Became], found: Sequence[Outcome]) -> str:
    """Return a TOML file with these settings, and a comment on every option."""
    lines = [*_comment(f"Made from {' and '.join(sources)} by `sdtrain import-kohya`; `sdtrain check` looks at it.")]
    lines += _comment("Beside each setting stand the options it comes from; the others are at the end.")
    lines += ["", *_body(settings), "", *_end(found)]
    return "\n".join(lines).rstrip() + "\n"


def _body(settings: Sequence[Became]) -> Iterator[str]:
    """Yield the lines of the settings, sections in the order of the schema."""
    sections: dict[str, list[Became]] = defaultdict(list)
    for became in settings:
        sections[became.setting.rpartition(".")[0]].append(became)
    for became in sections.pop("", []):
        yield from _setting(became)
    order = list(Config.model_fields)
    for section in sorted(sections, key=lambda name: (order.index(str(location_of(name)[0])), location_of(name)[1:])):
        yield ""
        yield f"[[{section.partition('[')[0]}]]" if "[" in section else f"[{section}]"
        for became in sections[section]:
            yield from _setting(became)


def _setting(became: Became) -> Iterator[str]:
    line = f"{toml_key(str(location_of(became.setting)[-1]))} = {toml_value(became.value)}"
    sources = ", ".join(dict.fromkeys(_shown(option) for option in became.options))
    said = "; ".join(part for part in (sources, became.note) if part)
    if len(line) + len(said) + 4 <= _WIDTH:
        yield f"{line}  # {_printable(said)}" if said else line
    else:
        yield from _comment(said)
        yield line


def _end(found: Sequence[Outcome]) -> Iterator[str]:
    """Yield the comments on the options that became no setting, those first that need a look."""
    for sort, heading in _HEADINGS.items():
        by_text: dict[str, list[str]] = defaultdict(list)
        for outcome in found:
            if outcome.sort == sort:
                by_text[outcome.text].append(_shown(outcome.option, value=sort != "off"))
        if by_text:
            yield "#"
            yield from _comment(heading)
        for text, names in by_text.items():
            said = ", ".join(dict.fromkeys(names))
            if text:
                said += f": {'it takes ' if sort == 'unreadable' else ''}{text}"
            yield from _comment(said, "  ")


def _shown(option: Option, *, value: bool = True) -> str:
    """Return an option as comments show it. Keys to other people's services are not copied."""
    if not value:
        return option.place
    if option.name in _SECRETS:
        return f"{option.place} = ..."
    shown = _plain(option.value)
    return f"{option.place} = {shown if len(shown) <= _LONGEST_VALUE else shown[: _LONGEST_VALUE - 3] + '...'}"


def _plain(value: Any) -> str:
    if isinstance(value, str | bool | list | dict):
        return toml_value(value) if not isinstance(value, list | dict) else str(value)
    return str(value)


def _comment(text: str, indent: str = "") -> list[str]:
    """Return a text as lines of comments, words unbroken."""
    wrapped = textwrap.wrap(
        _printable(text),
        _WIDTH - 2 - len(indent),
        subsequent_indent="  " if indent else "",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [f"# {indent}{line}".rstrip() for line in wrapped]


def _printable(text: str) -> str:
    """Return a text without control characters, which would end a comment; they stand as `\\n` and the like."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
