"""Signs in captions that mean something to other tools, and are words like any other here."""

from __future__ import annotations

import re

_SIGNS = {
    "extra networks": re.compile(r"<[a-z]+:[^<>]+>", flags=re.IGNORECASE),
    "weights": re.compile(r"[(\[][^()\[\]]+:[0-9.]+[)\]]"),
    "names of wildcard files": re.compile(r"__\w+?__"),
}
_CHOICE = re.compile(r"\{[^{}]*\|[^{}]*\}")


def literal_signs(caption: str, *, wildcards: bool) -> dict[str, str]:
    """Return the signs in a caption that will be trained as they stand: what they are elsewhere -> the first of them.

    wildcards: whether `{red|blue}` is read as a choice of two.
    """
    signs = _SIGNS if wildcards else {"wildcards": _CHOICE, **_SIGNS}
    matches = {what: pattern.search(caption) for what, pattern in signs.items()}
    return {what: match[0] for what, match in matches.items() if match}


def has_words(caption: str) -> bool:
    """Return whether a caption says anything: a lone comma does not."""
    return re.search(r"\w", caption) is not None
