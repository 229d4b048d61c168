"""Laws of compiled blocks: a compilation serves all buckets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sdtrain.adapters.attach import AdapterSettings, attach_adapters
from sdtrain.config.read import resolve
from sdtrain.files.locations import BUILTIN_FOLDER
from sdtrain.matmul import multiply_fast
from sdtrain.training.parameters import compile_blocks
from sdtrain.training.run import notes_on

SIZES = [(12, 12), (16, 8), (8, 16), (20, 8), (24, 16)]


@pytest.mark.slow
def test_blocks_of_one_width_are_compiled_twice_at_most_for_any_number_of_buckets() -> None:
    """Once for several pictures and once for a single one, which torch always compiles apart."""
    from diffusers import UNet2DConditionModel
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("eager")  # what is counted is the tracing, whoever makes code of it
    unet: Any = UNet2DConditionModel.from_pretrained(BUILTIN_FOLDER / "tiny-sdxl", subfolder="unet")
    blocks = [module for module in unet.modules() if type(module).__name__ == "BasicTransformerBlock"]
    kinds = {(block.norm1.weight.numel(), block.attn1.heads) for block in blocks}
    modules = [name for name, _ in unet.named_modules() if name.endswith((".to_q", ".to_v"))]
    multiply_fast(unet)
    attach_adapters(unet, modules, AdapterSettings(), torch.Generator())
    compile_blocks(unet, backend=counter)
    config = unet.config
    counts = []
    for num in (2, 1):
        for height, width in SIZES:
            text = torch.randn(num, 77, config.cross_attention_dim)
            added = {"text_embeds": torch.randn(num, 96), "time_ids": torch.randn(num, 6)}
            out = unet(torch.randn(num, 4, height, width), torch.tensor(3), text, added_cond_kwargs=added).sample
            out.sum().backward()
            counts.append(counter.frame_count)
    assert counts[0] == counts[len(SIZES) - 1], "other buckets are served by what was compiled for the first"
    assert counts[-1] == counts[len(SIZES)] <= 2 * counts[0]
    assert counts[0] <= 2 * len(kinds)


@pytest.mark.parametrize(
    ("compiled", "device", "faster"),
    [(True, "cpu", True), (True, "cpu", False), (True, "cuda", True), (False, "cpu", True)],
)
def test_where_compiled_steps_are_slower_it_is_said(
    table: dict[str, Any], monkeypatch: pytest.MonkeyPatch, compiled: bool, device: str, faster: bool
) -> None:
    monkeypatch.setattr("sdtrain.training.run.onednn_is_faster", lambda: faster)
    monkeypatch.setattr("sdtrain.training.run.lacks_bfloat16", lambda _: False)
    config = resolve(table | {"memory": {"compile": compiled}}, "test config")
    said = any("compiled steps are slower" in note for note in notes_on(config, torch.device(device)))
    assert said == (compiled and device == "cpu" and faster)
