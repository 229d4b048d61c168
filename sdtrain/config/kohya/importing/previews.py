"""From sample prompts there, with their flags such as `--n blurry --w 768`, to [preview] here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from sdtrain.config.kohya.importing.findings import Became, Finding, Lost, direct
from sdtrain.config.kohya.importing.options import ForeignConfig, Option
from sdtrain.config.kohya.importing.values import UnreadableError, count, number, text
from sdtrain.families.words import LATENT_FACTOR_PX

_FLAG = re.compile(r"\s--([a-z]+)\s+")
SAMPLERS = ("euler", "euler_a")
"""Those of sd-scripts that are the same here; `k_euler` is `euler`."""
_FILES = (".txt", ".toml", ".json")


def translate_previews(config: ForeignConfig) -> Iterator[Finding]:
    """Yield the prompts, and what their flags say of all of them."""
    options = config.arguments
    yield from direct(options, "preview.num_inference_steps", count, "sample_steps")
    yield from _sampler(options.find("sample_sampler"))
    option = options.find("sample_prompts")
    if option is None:
        return
    lines = _lines(option)
    if lines is None:
        yield Lost(option, "the file is not here, or is no .txt file; write its prompts into preview.prompts")
        return
    read = [_prompt(line) for line in lines]
    yield Became("preview.prompts", [words for words, _ in read if words], (option,))
    flags = {name: value for _, found in reversed(read) for name, value in found.items()}
    yield from _flags(option, flags)
    if seeds := sorted(
        {int(found["d"]) for _, found in read if found.get("d", "").isdecimal() and len(found["d"]) < 19}
    ):
        yield Became("preview.seeds", seeds, (option,))


def _sampler(option: Option | None) -> Iterator[Finding]:
    """Yield the sampler that is the same here; of their others there is none."""
    if option is None:
        return
    name = str(option.value).strip().lower().removeprefix("k_")
    if name in SAMPLERS:
        yield Became("preview.sampler", name, (option,))
    else:
        yield Lost(option, "previews are drawn with euler, or what preview.sampler names")


def _lines(option: Option) -> list[str] | None:
    """Return the prompts of an option: its own lines, or those of the file that it names."""
    written = option.value if isinstance(option.value, list) else str(option.value).splitlines()
    lines = [str(line).strip() for line in written]
    if len(lines) == 1 and lines[0].lower().endswith(_FILES):
        try:
            if not lines[0].lower().endswith(".txt"):
                return None
            lines = Path(lines[0]).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):
            return None
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def _prompt(line: str) -> tuple[str, dict[str, str]]:
    """Return the words of a line, and its flags by their letters."""
    words, *rest = _FLAG.split(f" {line}")
    return words.strip(), {name: value.strip() for name, value in zip(rest[::2], rest[1::2], strict=True)}


def _flags(option: Option, flags: dict[str, str]) -> Iterator[Finding]:
    readers = {
        "n": ("preview.negative_prompt", text),
        "w": ("preview.width_px", _side),
        "h": ("preview.height_px", _side),
        "s": ("preview.num_inference_steps", count),
        "l": ("preview.guidance_scale", lambda value: number(value, least=1)),
    }
    for letter, (setting, read) in readers.items():
        if letter in flags:
            try:
                yield Became(setting, read(flags[letter]), (option,), f"--{letter} of the prompts")
            except UnreadableError as error:
                yield Lost(option, f"--{letter} {flags[letter]} is left out: {setting} takes {error}")


def _side(value: object) -> int:
    return int(number(value, least=LATENT_FACTOR_PX)) // LATENT_FACTOR_PX * LATENT_FACTOR_PX
