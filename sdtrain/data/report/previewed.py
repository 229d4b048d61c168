"""What previews show: the prompts of a config, or the first captions of its own pictures."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import shorten

from sdtrain.config.schema import Config
from sdtrain.data.examples import Example
from sdtrain.data.identity.held_out import training_examples

NUM_OWN_PROMPTS = 3
"""How many captions of the pictures are previewed where no prompts are named."""
LONGEST_PROMPT = 60


def with_prompts(config: Config, examples: Sequence[Example]) -> Config:
    """Return the config of a run whose previews show something: without prompts, captions of its own pictures.

    `preview.every = 0` stays none.
    """
    if config.preview.prompts or not config.preview.every:
        return config
    prompts = own_prompts(config, examples)
    return config.model_copy(update={"preview": config.preview.model_copy(update={"prompts": prompts})})


def own_prompts(config: Config, examples: Sequence[Example]) -> list[str]:
    """Return the first captions of the pictures that are trained on, each once; the empty one where none has any.

    They follow from the pictures and their order alone; pictures of what is known already are passed over.
    """
    folders = config.data.folder
    taught = [one for one in training_examples(examples) if not folders[one.folder].regularisation]
    captions = list(dict.fromkeys(one.caption for one in taught if one.caption))
    return captions[:NUM_OWN_PROMPTS] or [""]


def previews_text(config: Config, examples: Sequence[Example]) -> str:
    """Return when previews are drawn, and of which captions where no prompts were named."""
    preview = config.preview
    if not preview.every or not preview.prompts:
        return "none"
    num = len(preview.prompts) * len(preview.seeds)
    drawn = f"{num} picture{'' if num == 1 else 's'} every {preview.every} steps"
    if preview.prompts != own_prompts(config, examples):
        return drawn
    prompts = ", ".join(f'"{shorten(prompt, LONGEST_PROMPT, placeholder=" ...")}"' for prompt in preview.prompts)
    return f"{drawn}, of captions of your own pictures: {prompts}"
