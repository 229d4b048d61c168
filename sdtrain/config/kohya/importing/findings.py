"""What the translators find out about options, one thing at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from sdtrain.config.kohya.importing.options import ForeignConfig, Option, Options
from sdtrain.config.kohya.importing.values import UnreadableError


@dataclass(frozen=True)
class Became:
    """A setting and the options that it follows from; none: the file does not say it.

    setting: its path, such as `data.batch_size`. note: what has to be said beside it.
    """

    setting: str
    value: Any
    options: tuple[Option, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class NotNeeded:
    """An option that is not needed, and why."""

    option: Option
    why: str


@dataclass(frozen=True)
class Lost:
    """An option that has no counterpart, and why."""

    option: Option
    why: str


@dataclass(frozen=True)
class Unreadable:
    """An option whose value is not one of its values; what would be."""

    option: Option
    allowed: str


Read = TypeVar("Read")
Finding = Became | NotNeeded | Lost | Unreadable
Translator = Callable[[ForeignConfig], Iterator[Finding]]


def read_as(option: Option | None, read: Callable[[Any], Read], default: Read) -> Read:
    """Return the value of an option, or the default where it is missing or cannot be read (which `unread` tells)."""
    if option is None:
        return default
    try:
        return read(option.value)
    except UnreadableError:
        return default


def unread(option: Option | None, read: Callable[[Any], Any]) -> Iterator[Unreadable]:
    """Yield the finding that an option cannot be read, if that is so."""
    if option is not None:
        try:
            read(option.value)
        except UnreadableError as error:
            yield Unreadable(option, str(error))


def direct(
    options: Options, setting: str, read: Callable[[Any], Any], *names: str, note: str = ""
) -> Iterator[Finding]:
    """Yield what becomes of the options with these names, whose value is the setting's own; nothing of 0 and false."""
    option = options.find(*names)
    if option is not None:
        try:
            if value := read(option.value):
                yield Became(setting, value, (option,), note)
        except UnreadableError as error:
            yield Unreadable(option, str(error))
