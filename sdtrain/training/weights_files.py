"""Which files hold the weights of a run, in which form and names, and who reads them right; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sdtrain.config.schema import Config, LoraConfig
from sdtrain.families.readers import Kind, Naming, Reader, readers_of

NATIVE = "-native"
"""What the name of a file ends in that holds the adapters as they were trained, beside the form that others read."""


@dataclass(frozen=True)
class WeightsFile:
    """One of the files that a run writes at a time."""

    ending: str
    """What its name has beside that of the run: empty, or `NATIVE`."""
    form: Literal["native", "lora", "diff"]
    kind: Kind
    """The kind of adapter that is in it."""
    names: Naming

    def at(self, path: Path) -> Path:
        """Return where it is written, when `path` is where the main file is."""
        return path.with_name(f"{path.stem}{self.ending}{path.suffix}") if self.ending else path

    @property
    def readers(self) -> tuple[Reader, ...]:
        """The tools that compute from it what it did in training."""
        return readers_of(self.kind, self.names)


def native_file(method: LoraConfig, names: Naming, ending: str = "") -> WeightsFile:
    """Return the file with the adapters as they were trained. OFT has words in diffusers names only."""
    kind: Kind = "lora" if method.adapter == "rslora" else method.adapter
    return WeightsFile(ending, "native", kind, "diffusers" if kind == "oft" else names)


def weights_files(config: Config) -> list[WeightsFile]:
    """Return the adapter files of a run, the exact one first, for it is quickly written; empty for a full fine-tune.

    With `auto` the main file is an ordinary LoRA where no tool reads the adapters themselves right in these names: of
    `dora` and `oft` in those of sd-scripts. Where the main file has another form, the adapters as they were trained
    stand beside it, in the names in which most tools read them: a run can start from those only.
    """
    method, names = config.method, config.export.names
    if not isinstance(method, LoraConfig):
        return []
    form = config.export.form
    main = native_file(method, names)
    if form == "auto":
        form = "native" if main.readers else "lora"
    if form == "native" or (form == "lora" and main.kind == "lora"):
        return [main]
    native = native_file(method, "diffusers" if main.kind == "dora" else names, NATIVE)
    return [native, WeightsFile("", form, form, names)]


def reader_lines(config: Config) -> list[str]:
    """Return one sentence for each file: what is in it, and who computes from it what it did in training."""
    return [
        f"{file.at(Path(config.name + '.safetensors'))}: {file.kind} in {file.names} names, read right by "
        + (", ".join(file.readers) or "sdtrain alone")
        for file in reversed(weights_files(config))
    ]
