"""What is said about an option of sd-scripts or kohya_ss: its name here, why it is not needed, or what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, assert_never

Kind = Literal["setting", "not needed", "no counterpart"]


@dataclass(frozen=True)
class Answer:
    """What an option is here.

    setting: the setting it becomes, as errors print it; empty for the other kinds. why: what is to be said about it.
    """

    kind: Kind
    setting: str = ""
    why: str = ""

    def sentence(self) -> str:
        """Return the answer to someone who has put the option into a config of ours."""
        match self.kind:
            case "setting":
                return f"an option of sd-scripts, which here is `{self.setting}`" + (
                    f": {self.why}" if self.why else ""
                )
            case "not needed":
                return self.why
            case "no counterpart":
                return f"an option of sd-scripts without a counterpart: {self.why}"
            case _:
                assert_never(self.kind)


Answers = Mapping[str, Answer]


def becomes(setting: str, *options: str, why: str = "") -> Answers:
    """Return the answers of options that become a setting."""
    return dict.fromkeys(options, Answer("setting", setting, why))


def needless(why: str, *options: str) -> Answers:
    """Return the answers of options that are not needed here."""
    return dict.fromkeys(options, Answer("not needed", why=why))


def missing(why: str, *options: str) -> Answers:
    """Return the answers of options that sdtrain has nothing for."""
    return dict.fromkeys(options, Answer("no counterpart", why=why))
