"""Reads files of sd-scripts and kohya_ss into a flat list of options."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtrain.config.kohya.importing.values import is_unset, words
from sdtrain.errors import user_error

ARGUMENT_LISTS = ("network_args", "optimizer_args", "lr_scheduler_args", "additional_parameters")
"""Options that hold further options as `name=value`."""

DATASETS = "datasets"
SUBSETS = "subsets"
GENERAL = "general"


@dataclass(frozen=True)
class Option:
    """One option as it stands in a file.

    place: where it stands, as comments print it, such as `datasets[0].subsets[1].num_repeats`. within: the option
    that holds it, such as `network_args`; empty for most.
    """

    name: str
    place: str
    value: Any
    within: str = ""

    @property
    def is_set(self) -> bool:
        """Whether it says anything."""
        return not is_unset(self.value)


@dataclass(frozen=True)
class Subset:
    """One folder of a dataset config, with the options that count for it: its own, its dataset's, the general ones."""

    options: Options
    dataset: int


@dataclass(frozen=True)
class Options:
    """Options in the order in which they were read; of those with one name the last counts."""

    all: tuple[Option, ...]

    def find(self, *names: str) -> Option | None:
        """Return the option that counts among those with these names and a value; the first name has precedence."""
        for name in names:
            for option in reversed(self.all):
                if option.name == name and option.is_set:
                    return option
        return None

    def having(self, *names: str) -> tuple[Option, ...]:
        """Return all options with these names."""
        return tuple(option for option in self.all if option.name in names)


@dataclass(frozen=True)
class ForeignConfig:
    """What was read from all files.

    arguments: the options of the trainings and the general ones of the data. subsets: the folders of dataset configs.
    everything: all options there are, each once.
    """

    sources: tuple[str, ...]
    arguments: Options
    subsets: tuple[Subset, ...]
    everything: tuple[Option, ...]


def read_foreign(paths: Sequence[Path]) -> ForeignConfig:
    """Return the options in files of sd-scripts or kohya_ss: TOML or JSON, of a training or of a dataset.

    Raises UserError where a file cannot be read.
    """
    return foreign_config([(path.name, read_file(path)) for path in paths])


def read_file(path: Path) -> dict[str, Any]:
    """Return the table in a TOML or JSON file. Raises UserError."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise user_error(str(path), "file", "is not text in UTF-8") from None
    except OSError as error:
        raise user_error(str(path), "file", f"cannot be read: {error.strerror or error}") from None
    is_json = path.suffix.lower() == ".json" or content.lstrip().startswith("{")
    try:
        table = json.loads(content) if is_json else tomllib.loads(content)
    except (ValueError, RecursionError) as error:
        kind = "JSON" if is_json else "TOML"
        raise user_error(str(path), "syntax", f"not {kind}: {error}; give a .toml or .json file of kohya") from None
    if not isinstance(table, dict):
        raise user_error(str(path), "syntax", "holds no options; give a .toml or .json file of kohya")
    return table


def foreign_config(tables: Sequence[tuple[str, Mapping[str, Any]]]) -> ForeignConfig:
    """Return the options in plain tables, each with the name of its file."""
    arguments: list[Option] = []
    subsets: list[Subset] = []
    everything: list[Option] = []
    num_datasets = 0
    for source, table in tables:
        place = f"{source}: " if len(tables) > 1 else ""
        found = [option for key, value in table.items() if key != DATASETS for option in _flat(key, value, place)]
        general = [option for option in found if option.place.startswith(f"{place}{GENERAL}.")]
        arguments += found
        everything += found
        for index, dataset in enumerate(_tables(table.get(DATASETS))):
            of_dataset, of_subsets = _dataset(dataset, f"{place}{DATASETS}[{index}].")
            everything += [*of_dataset, *(option for own in of_subsets for option in own)]
            above = (*general, *of_dataset)
            subsets += [Subset(Options((*above, *own)), num_datasets) for own in of_subsets]
            num_datasets += 1
        if DATASETS in table and not _tables(table[DATASETS]):
            everything.append(Option(DATASETS, f"{place}{DATASETS}", _clean(table[DATASETS])))
    return ForeignConfig(
        tuple(name for name, _ in tables), Options(tuple(arguments)), tuple(subsets), tuple(everything)
    )


def _dataset(dataset: Mapping[str, Any], place: str) -> tuple[list[Option], list[list[Option]]]:
    own = [option for key, value in dataset.items() if key != SUBSETS for option in _flat(key, value, place)]
    inner = [
        [option for key, value in subset.items() for option in _flat(key, value, f"{place}{SUBSETS}[{index}].")]
        for index, subset in enumerate(_tables(dataset.get(SUBSETS)))
    ]
    if SUBSETS in dataset and not inner:
        own.append(Option(SUBSETS, f"{place}{SUBSETS}", _clean(dataset[SUBSETS])))
    return own, inner


def _flat(key: str, value: Any, place: str, within: str = "") -> Iterator[Option]:
    """Yield the options in a value: its own, or those inside it where it is a section or a list of arguments."""
    name = _clean_text(key)
    if isinstance(value, Mapping):
        holder = key if key in ARGUMENT_LISTS else within
        for inner, inner_value in value.items():
            yield from _flat(inner, inner_value, f"{place}{name}.", holder)
        if not value:
            yield Option(name, f"{place}{name}", {}, within)
        return
    yield Option(name, f"{place}{name}", _clean(value), within)
    if key in ARGUMENT_LISTS and not is_unset(value):
        for word in words(value):
            inner, _, inner_value = _clean_text(word).strip().lstrip("-").partition("=")
            if inner:
                yield Option(inner, f"{place}{name}: {inner}", inner_value or True, key)


def _tables(value: Any) -> list[Mapping[str, Any]]:
    """Return the tables in a list of them; nothing for what is no such list."""
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []


def _clean(value: Any) -> Any:
    """Return a value whose texts can be written: JSON can hold halves of characters, which UTF-8 cannot."""
    if isinstance(value, str):
        return _clean_text(value)
    return [_clean(entry) for entry in value] if isinstance(value, list) else value


def _clean_text(written: str) -> str:
    return written.encode("utf-8", "replace").decode("utf-8")
