"""Reads a config as far as it goes, so that one mistake does not hide the next.

What is wrong is told, and put out of the way: an unknown setting is left out, a wrong value gives way to its default or
to a stand-in. So there is always a Config to go on with, beside a list of those settings that are not to be believed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError

from sdtrain.config.mistakes import Mistake, Table, mistakes_in
from sdtrain.config.overrides import Override, responsible
from sdtrain.config.paths import Location, begins_with, holds, location_of, order_in, path_text
from sdtrain.config.presets import with_preset
from sdtrain.config.rules import broken_rules
from sdtrain.config.schema import Config
from sdtrain.config.text.lines import Lines, nearest_line
from sdtrain.errors import Problem, UserError

STAND_INS: dict[Location, Any] = {
    ("name",): "unnamed",
    ("steps",): 1,
    ("model",): {"path": ""},
    ("model", "path"): "",
    ("method",): {"kind": "lora"},
    ("method", "kind"): "lora",  # a full fine-tune has no setting that a LoRA has not: nothing is refused for it
    ("data",): {"folder": [{"path": ""}]},
    ("data", "folder"): [{"path": ""}],
    ("data", "folder", 0): {"path": ""},
    ("data", "folder", 0, "path"): "",
}
"""Values that stand in for settings without a default; 0 stands for any index of a list."""
DEEPER: dict[Location, int] = {("data", "folder", 0): 4, ("export", "about"): 3}
"""Where settings stand deeper than in a section of their own, and how many parts the whole of one has there."""


@dataclass(frozen=True)
class Written:
    """A plain table as a person wrote it.

    source: where it was read from. plain: the table as it stands there. table: the same with the overrides put in.
    overrides: those that were put in. problems: those of overrides that could not be. lines: where in `source` each
    setting of `plain` stands, as far as that is known.
    """

    source: str
    plain: Table
    table: Table
    overrides: tuple[Override, ...] = ()
    problems: tuple[Problem, ...] = ()
    lines: Lines = field(default_factory=dict)


@dataclass(frozen=True)
class Draft:
    """A config that may be wrong.

    doubtful: the settings whose value in `config` is not what the user meant.
    """

    written: Written
    config: Config
    doubtful: tuple[Location, ...]
    problems: tuple[Problem, ...]

    def knows(self, *settings: str) -> bool:
        """Return whether all of these settings, and all settings inside them, are as the user meant them."""
        asked = [location_of(setting) for setting in settings]
        return not any(
            begins_with(location, doubt) or begins_with(doubt, location)
            for location in asked
            for doubt in self.doubtful
        )

    @property
    def is_sound(self) -> bool:
        """Whether nothing wrong has been found so far."""
        return not self.problems and not self.written.problems

    def with_problems(self, problems: Iterable[Problem]) -> Draft:
        """Return the draft with more problems."""
        return replace(self, problems=(*self.problems, *problems))

    def with_new_problems(self, problems: Iterable[Problem]) -> Draft:
        """Return the draft with more problems, except those that only follow from what is known to be wrong.

        Where a setting or a file has problems already, no more are added.
        """
        taken = {problem.where for problem in self.problems}
        return self.with_problems(
            problem for problem in problems if problem.where not in taken and self.knows(*_settings(problem))
        )

    def require_sound(self) -> Config:
        """Return the config. Raises UserError with everything that is wrong."""
        if not self.is_sound:
            raise told(self.written, self.problems)
        return self.config


def draft_of(written: Written) -> Draft:
    """Return the draft of what was written: checked against the schema, then by each rule whose settings are known."""
    config, mistakes = _checked(written.table)
    wrong = [mistake.meant if mistake.unknown else mistake.setting for mistake in mistakes]
    draft = Draft(
        written=written,
        config=config,
        doubtful=tuple(location for location in wrong if location is not None),
        problems=tuple(
            Problem(path_text(mistake.setting), mistake.what, line=nearest_line(written.lines, mistake.setting))
            for mistake in mistakes
        ),
    )
    return draft.with_problems(broken_rules(config, draft.knows))


def told(written: Written, problems: Sequence[Problem]) -> UserError:
    """Return the error with all problems of what was written.

    Those of the file come first, in its order and with its lines, then those of the command line.
    """
    own: list[tuple[tuple[float, ...], Problem]] = []
    given: list[tuple[int, Problem]] = []
    for problem in problems:
        override = _override_of(written, problem)
        if override is None:
            line = written.lines.get(location_of(problem.where)) if problem.line is None else problem.line
            own.append((order_in(written.plain, location_of(_settings(problem)[0])), replace(problem, line=line)))
        else:
            given.append((written.overrides.index(override), _at_override(problem, override)))
    own.sort(key=lambda pair: pair[0])
    given.sort(key=lambda pair: pair[0])
    ordered = [*(problem for _, problem in own), *(problem for _, problem in given), *written.problems]
    return UserError(written.source if own else "--set", ordered)


def _settings(problem: Problem) -> tuple[str, ...]:
    return problem.settings or (problem.where,)


def _override_of(written: Written, problem: Problem) -> Override | None:
    """Return the override that a problem comes from, None when it is the file's.

    The setting that the problem names counts before the other settings that the problem follows from.
    """
    settings = _settings(problem)
    if not begins_with(location_of(settings[0]), location_of(problem.where)):
        return None  # the place is a file, which is what has to be mended
    for setting in settings:
        if override := responsible(written.overrides, written.plain, location_of(setting)):
            return override
    return None


def _at_override(problem: Problem, override: Override) -> Problem:
    """Return the problem with the override as its place.

    The text names the setting where the override is of another one.
    """
    same = location_of(problem.where) == override.setting
    return Problem(override.place, problem.what if same else f"{problem.where}: {problem.what}")


def _checked(table: Table) -> tuple[Config, list[Mistake]]:
    """Return the config in a table, as far as it can be read, and what is wrong with the table."""
    try:
        return Config.model_validate(with_preset(table)), []
    except ValidationError as error:
        mistakes = mistakes_in(error.errors(include_url=False), table)
    mended = deepcopy(table)
    for mistake in mistakes:
        _mend(mended, mistake)
    config, more = _checked(mended)  # what hid behind them, such as the settings of a method without a kind
    return config, [*mistakes, *more]


def _mend(table: Table, mistake: Mistake) -> None:
    """Take a mistake out of a table; the table itself is changed."""
    setting = mistake.setting
    pattern = tuple(0 if isinstance(part, int) else part for part in setting)
    if mistake.unknown or pattern not in STAND_INS:
        if not mistake.unknown:
            setting = setting[: next((depth for start, depth in DEEPER.items() if begins_with(pattern, start)), 2)]
        if holds(table, setting):  # a mistake before this one may have taken what it stands in
            _inner(table, setting).pop(setting[-1])
    elif holds(table, setting[:-1]):
        _inner(table, setting)[setting[-1]] = deepcopy(STAND_INS[pattern])


def _inner(table: Table, setting: Location) -> Any:
    """Return the table or list that a setting stands in."""
    value: Any = table
    for part in setting[:-1]:
        value = value[part]
    return value
