"""Captions that are cut are found without torch, as the text encoders would cut them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sdtrain.config.schema import ModelConfig
from sdtrain.models.checkpoints.inspect import OpenedModel, open_model
from sdtrain.models.checkpoints.tokenizers import load_tokenizer
from sdtrain.models.token_counts import too_long

LONG = "a photograph of " + " ".join(f"thing{number}," for number in range(30)) + " with a RED UMBRELLA"


@pytest.fixture(scope="module")
def opened() -> OpenedModel:
    return open_model(ModelConfig(path="builtin:tiny-sdxl"), "test")


def test_a_long_caption_is_told_with_its_length_and_what_is_not_read(opened: OpenedModel) -> None:
    (found,) = too_long(opened.tokenizers, ["a cat", LONG, LONG], 1)
    tokenizer = load_tokenizer(opened.tokenizers[0])
    ids = tokenizer.encode(LONG, add_special_tokens=False)
    assert found.num_tokens == len(ids) > 75
    assert LONG.endswith(found.rest) and found.rest.endswith("with a RED UMBRELLA")
    read = LONG[: -len(found.rest)]
    assert len(tokenizer.encode(read, add_special_tokens=False)) <= 75
    word = found.rest.split()[0]
    assert len(tokenizer.encode(read + word, add_special_tokens=False)) > 75, "the first word that is cut"


def test_what_fits_exactly_is_not_told_and_one_token_more_is(opened: OpenedModel) -> None:
    tokenizer = load_tokenizer(opened.tokenizers[0])
    fits = "."
    while len(tokenizer.encode(fits + " .", add_special_tokens=False)) <= 75:
        fits += " ."
    assert too_long(opened.tokenizers, [fits], 1) == []
    assert [(long.num_tokens, long.rest) for long in too_long(opened.tokenizers, [fits + " ."], 1)] == [(76, ".")]
    assert too_long(opened.tokenizers, [fits + " ."], 2) == []


def test_the_longest_comes_first(opened: OpenedModel) -> None:
    found = too_long(opened.tokenizers, [LONG, LONG + " " + LONG], 1)
    assert [long.caption for long in found] == [LONG + " " + LONG, LONG]


def test_counting_never_imports_torch() -> None:
    code = (
        "import sys; from sdtrain.config.schema import ModelConfig; "
        "from sdtrain.models.checkpoints.inspect import open_model; from sdtrain.models.token_counts import too_long; "
        "found = too_long(open_model(ModelConfig(path='builtin:tiny-sdxl'), '').tokenizers, ['a b ' * 99], 1); "
        "sys.exit(not found or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
