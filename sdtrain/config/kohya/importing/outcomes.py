"""What has become of every option, once all findings are there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, assert_never

from sdtrain.config.kohya.answers import Answer
from sdtrain.config.kohya.importing.findings import Became, Finding, Lost, NotNeeded, Unreadable
from sdtrain.config.kohya.importing.options import DATASETS, Option
from sdtrain.config.kohya.importing.values import is_off
from sdtrain.config.kohya.known import KNOWN, NETWORK_ARGS, NEUTRAL, OPTIMIZER_ARGS

Sort = Literal["setting", "not needed", "no counterpart", "off", "unreadable", "unknown"]


@dataclass(frozen=True)
class Outcome:
    """What became of an option. text: the settings it became, or why it became none."""

    option: Option
    sort: Sort
    text: str = ""


def outcomes(options: Sequence[Option], findings: Sequence[Finding]) -> list[Outcome]:
    """Return what became of each option: what was found out, else what is known of its name. None is left out."""
    found = [_found(option, findings) for option in options]
    settings = [one for one in found if one is not None and one.sort == "setting"]
    taken = {setting: one.option for one in settings for setting in one.text.split(", ")}
    taken |= {one.option.name: one.option for one in settings}
    return [one or _by_name(option, taken) for option, one in zip(options, found, strict=True)]


def _found(option: Option, findings: Sequence[Finding]) -> Outcome | None:
    """Return what findings say of an option; a loss counts more than a gain, for it must not go unseen."""
    settings: list[str] = []
    others: list[Outcome] = []
    for finding in findings:
        match finding:
            case Became(setting=setting, options=sources):
                settings += [setting] if any(option is source for source in sources) else []
            case NotNeeded(option=source, why=why) if source is option:
                others.append(Outcome(option, "not needed", why))
            case Lost(option=source, why=why) if source is option:
                others.append(Outcome(option, "no counterpart", why))
            case Unreadable(option=source, allowed=allowed) if source is option:
                others.append(Outcome(option, "unreadable", allowed))
            case NotNeeded() | Lost() | Unreadable():
                pass
            case _:
                assert_never(finding)
    for sort in ("unreadable", "no counterpart"):
        for outcome in others:
            if outcome.sort == sort:
                return outcome
    if settings:
        return Outcome(option, "setting", ", ".join(dict.fromkeys(settings)))
    return others[0] if others else None


def _by_name(option: Option, taken: Mapping[str, Option]) -> Outcome:
    """Return the outcome of an option that nothing was found out about.

    taken: by its name or by the setting that it became, the option of the same meaning that counts.
    """
    answer = _known(option)
    same = taken.get(option.name)
    if same is None and (is_off(option.value) or str(option.value).lower() in NEUTRAL.get(option.name, ())):
        return Outcome(option, "off")
    other = same or (taken.get(answer.setting) if answer is not None else None)
    if other is not None and option.is_set:
        if str(other.value) == str(option.value):
            return Outcome(option, "not needed", f"the same as {other.place}")
        if f"{DATASETS}[" in option.place:
            return Outcome(option, "no counterpart", f"one value counts for all, that of {other.place}")
        return Outcome(option, "not needed", f"{other.place} counts, there too")
    if answer is None:
        near = get_close_matches(option.name, KNOWN, n=1, cutoff=0.75)
        return Outcome(option, "unknown", f"perhaps `{near[0]}` was meant" if near else "")
    match answer.kind:
        case "setting":
            return Outcome(option, "not needed", f"nothing to set: {answer.setting} stays as it is")
        case "not needed" | "no counterpart":
            return Outcome(option, answer.kind, answer.why)
        case _:
            assert_never(answer.kind)


def _known(option: Option) -> Answer | None:
    match option.within:
        case "network_args" if option.name in NETWORK_ARGS:
            return NETWORK_ARGS[option.name]
        case "optimizer_args" if option.name in OPTIMIZER_ARGS:
            return OPTIMIZER_ARGS[option.name]
        case "lr_scheduler_args":
            return KNOWN["lr_scheduler_args"]
        case _:
            return KNOWN.get(option.name)


def count_sorts(found: Sequence[Outcome]) -> Iterator[tuple[Sort, int]]:
    """Yield how many options there are of each sort, in the order of importance."""
    for sort in ("setting", "not needed", "no counterpart", "off", "unreadable", "unknown"):
        yield sort, sum(one.sort == sort for one in found)
