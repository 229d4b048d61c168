"""The settings of the file that a run leaves, and of what stands in it for people to read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sdtrain.config.settings.values import Count, PathText, Settings, Share, Whole

Line = Annotated[str, Field(max_length=10_000)]


class AboutConfig(Settings):
    """What people should read about the file: it stands in its header, where web interfaces and hubs look."""

    author: Line = Field(default="", description="Who made it.")
    license: Line = Field(default="", description="Its licence, e.g. `CC-BY-4.0` or `openrail++`.")
    description: Line = Field(default="", description="What it is, in a few sentences.")
    tags: list[Line] = Field(default=[], description='What it is found by, e.g. `["style", "watercolour"]`.')
    trigger_words: list[Line] = Field(
        default=[], description="Words that call for what was taught; empty: the `trigger` of each folder."
    )
    usage_hint: Line = Field(default="", description="How to use it, e.g. a good strength.")
    thumbnail: PathText = Field(
        default="none",
        description="A small picture in the header: `preview`, the first one of the newest preview; the path of a "
        "picture; or `none`.",
    )


class ExportConfig(Settings):
    """The file that a finished run leaves."""

    names: Literal["sd-scripts", "diffusers"] = Field(
        default="sd-scripts",
        description="Names of a LoRA's layers: `sd-scripts` loads everywhere, `diffusers` in diffusers and peft.",
    )
    form: Literal["auto", "native", "lora", "diff"] = Field(
        default="auto",
        description="How adapters are written: `native` as they were trained, `lora` as an ordinary LoRA (the nearest "
        "by singular values; what is lost is told), `diff` as the whole change, exact and large. `auto`: `lora` where "
        "no tool reads the adapters themselves right, as of `dora` and `oft`, else `native`. What was trained is then "
        "kept beside it, as `NAME-native`.",
    )
    rank: Count = Field(default=64, description="Highest rank of a layer in the form `lora`.")
    every: Whole = Field(
        default=0,
        description="Steps between files of averaged weights along the way, `NAME-step-000250.safetensors`; 0: none.",
    )
    keep: Count = Field(default=4, description="How many of those stay, the newest ones.")
    energy: Share = Field(
        default=0.9999, description="In the form `lora`: the fewest ranks that hold this share of each |dW|^2 are kept."
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto", description="Type of the stored weights; `auto`: adapters float32, checkpoints as their base."
    )
    about: AboutConfig = Field(default=AboutConfig(), description="What people should read about the file.")
