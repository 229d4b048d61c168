"""The parts of the built-in tiny SDXL, untrained, and the pipeline put together from saved training states."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import picture_world as world
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
WIDTHS = (64, 96)  # hidden sizes of the two text encoders; the U-Net attends to both side by side


def byte_symbols() -> list[str]:
    """One printable symbol for each of the 256 bytes, in CLIP's order: printable bytes stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def learn_merges(words: Counter[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until every word of the world is one symbol."""
    split = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter[tuple[str, str]]()
        for word, symbols in split.items():
            for pair in itertools.pairwise(symbols):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word, symbols in split.items():
            split[word] = merge_pair(symbols, best)


def merge_pair(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """`symbols` with every occurrence of `pair` joined, from left to right."""
    joined: list[str] = []
    for symbol in symbols:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined


def make_tokenizers(folder: Path) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """Two CLIP tokenizers over the world's words; as in SDXL the second one pads with "!"."""
    names = [*world.COLOURS, *world.SHAPES, *world.BACKGROUNDS, *world.RADII]
    text = " ".join([*(template for template, _ in world.TEMPLATES), *names, "an"]).replace(",", " ,")
    merges = learn_merges(Counter(word for word in text.split() if "{" not in word))
    symbols = byte_symbols()
    vocab = [*symbols, *(s + "</w>" for s in symbols), *("".join(pair) for pair in merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    first, second = (
        CLIPTokenizer(
            str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token=pad, model_max_length=77,
            bos_token=START, eos_token=END, unk_token=END,
        )
        for pad in (END, "!")
    )  # fmt: skip
    return first, second


def make_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Untrained encoders of three and four layers: SDXL reads the output of the last layer but one."""
    encoders = []
    for kind, width, layers in ((CLIPTextModel, WIDTHS[0], 3), (CLIPTextModelWithProjection, WIDTHS[1], 4)):
        config = CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, projection_dim=width,
            num_hidden_layers=layers, num_attention_heads=width // 32, max_position_embeddings=77, hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        encoder = kind(config)
        # CLIP's own 0.02 suits web-scale training; here words should differ clearly from the first step on.
        embeddings = encoder.get_input_embeddings()
        nn.init.normal_(embeddings.weight, std=0.4, generator=torch.Generator().manual_seed(width))
        encoders.append(encoder)
    return encoders[0], encoders[1]


def make_vae() -> AutoencoderKL:
    """An untrained autoencoder: factor 8, 4 latent channels, no attention, so that it is fast on a CPU.

    One group per norm, because a norm over few channels loses the plain colours that these pictures consist of.
    """
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(12, 24, 48, 64), layers_per_block=1, norm_num_groups=1, sample_size=128,
        mid_block_add_attention=False, force_upcast=False,
    )  # fmt: skip


CONSTANTS = slice(3, 5)
"""The channels of every layer of the autoencoder that carry +CONSTANT and -CONSTANT, and never anything else."""
CONSTANT = 16.0
MIRRORED = slice(5, 8)
"""The channels that start as the three colours times -1, so that a norm, which takes the mean away, finds none."""


@torch.no_grad()
def start_as_downscaler(vae: AutoencoderKL) -> None:
    """Sets weights so that the untrained latents are the picture at an eighth of its size, and decoding enlarges them.

    From random weights the group norms take thousands of steps to pass a plain colour through. Here colours travel
    along the residual path in channels 0 to 2, while CONSTANTS carry values so large that every norm is nearly a fixed
    scale, and the norms' weights undo that scale. Training then only has to sharpen edges.
    """
    for name, module in vae.named_modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.fill_(CONSTANT * (2 / module.num_channels) ** 0.5)
            module.weight[CONSTANTS] = 0  # they are no features
        elif name.endswith("conv2"):
            module.weight.zero_(), module.bias.zero_()
        elif isinstance(module, nn.Conv2d) and not name.endswith("conv1"):
            _pass_through(module, halving="downsamplers" in name)
    for part in (vae.encoder, vae.decoder):
        part.conv_in.weight[CONSTANTS] = 0
        part.conv_in.bias[CONSTANTS] = torch.tensor([CONSTANT, -CONSTANT])
        part.conv_in.weight[MIRRORED] = -part.conv_in.weight[:3]
        # Three above zero SiLU is nearly a line, of slope 1.09 and height 2.86.
        part.conv_norm_out.bias[:3] = 3.0
        part.conv_out.weight[:3].div_(1.09)
        part.conv_out.bias[:3] = -2.86 / 1.09
    # The fourth latent starts as a little of every other feature: from zero it would take long to become anything.
    encoder_out = vae.encoder.conv_out.weight
    features = encoder_out.shape[1] - MIRRORED.stop
    encoder_out[3] = 0
    encoder_out[3, MIRRORED.stop :, 1, 1] = (
        torch.randn(features, generator=torch.Generator().manual_seed(3)) * 30 / features**0.5
    )
    vae.quant_conv.weight[4:] = 0
    vae.quant_conv.bias[4:] = -6.0  # little noise in the latents from the start


def _pass_through(conv: nn.Conv2d, *, halving: bool) -> None:
    """Sets a convolution so that channels pass as they are, or as means of 2 x 2; new ones are a little random."""
    conv.weight.mul_(0.1)
    assert conv.bias is not None
    conv.bias.zero_()
    taps = ((0, 0), (0, 1), (1, 0), (1, 1)) if halving else ((conv.kernel_size[0] // 2,) * 2,)
    if conv.in_channels > CONSTANTS.stop:
        conv.weight[:, CONSTANTS] = 0
    for channel in range(min(conv.in_channels, conv.out_channels)):
        conv.weight[channel] = 0
        for y, x in taps:
            conv.weight[channel, channel, y, x] = 1 / len(taps)


def hold_constants(vae: AutoencoderKL) -> None:
    """Keeps training from reading or changing CONSTANTS: a weight that reads so large a value would tint everything."""
    for part in (vae.encoder, vae.decoder):
        for name, module in part.named_modules():
            if isinstance(module, nn.GroupNorm):
                module.weight.register_hook(lambda gradient: _without(gradient, 0))
                module.bias.register_hook(lambda gradient: _without(gradient, 0))
            elif isinstance(module, nn.Conv2d) and module.bias is not None:
                if name != "conv_in":
                    module.weight.register_hook(lambda gradient: _without(gradient, 1))
                if name != "conv_out" and not name.endswith("conv1"):
                    module.weight.register_hook(lambda gradient: _without(gradient, 0))
                    module.bias.register_hook(lambda gradient: _without(gradient, 0))


def _without(gradient: Tensor, axis: int) -> Tensor:
    """A gradient with zeros for CONSTANTS along an axis."""
    held = gradient.clone()
    held.narrow(axis, CONSTANTS.start, CONSTANTS.stop - CONSTANTS.start).zero_()
    return held


def make_unet() -> UNet2DConditionModel:
    """An untrained U-Net with SDXL's block types and conditioning."""
    return UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 64, 96), layers_per_block=1, attention_head_dim=(1, 2, 3), norm_num_groups=16,
        transformer_layers_per_block=1, cross_attention_dim=sum(WIDTHS), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=WIDTHS[1] + 6 * 32,
    )  # fmt: skip


def make_scheduler() -> EulerDiscreteScheduler:
    """v-prediction with zero terminal SNR: only so does a flat picture get its mean right."""
    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing",
    )  # fmt: skip


def make_pipeline(work: Path) -> StableDiffusionXLPipeline:
    """The pipeline in fp32: VAE and text encoders trained if `work` holds their states, the U-Net untrained."""
    torch.manual_seed(0)  # modules draw their initial weights from the global generator; nothing else here does
    tokenizer, tokenizer_2 = make_tokenizers(work / "tokenizer")
    text_encoder, text_encoder_2 = make_text_encoders(tokenizer)
    pipeline = StableDiffusionXLPipeline(
        vae=make_vae(), text_encoder=text_encoder, text_encoder_2=text_encoder_2, tokenizer=tokenizer,
        tokenizer_2=tokenizer_2, unet=make_unet(), scheduler=make_scheduler(), force_zeros_for_empty_prompt=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    vae, text = (read_state(work / f"{name}.pt") for name in ("vae", "text"))
    if vae and vae["folded"]:
        pipeline.vae.load_state_dict(vae["model"])
        pipeline.vae.register_to_config(scaling_factor=vae["scaling_factor"])
    if text:
        text_encoder.load_state_dict(text["text_encoder"])
        text_encoder_2.load_state_dict(text["text_encoder_2"])
    return pipeline


def learning_rate(step: int, steps: int, peak: float) -> float:
    """A short warm-up, then a cosine down to a fiftieth of the peak."""
    return peak * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps))))


def update(optimizer: torch.optim.Optimizer, loss: Tensor, lr: float) -> None:
    """One clipped optimizer step at learning rate `lr`, times the "scale" of a group that has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


def report(name: str, step: int, steps: int, losses: list[float], began: float) -> None:
    """One progress line with the mean of the last fifty losses."""
    mean, seconds = sum(losses[-50:]) / len(losses[-50:]), time.monotonic() - began
    print(f"{name} {step}/{steps} loss {mean:.4f} {seconds:.0f} s", flush=True)


def read_state(path: Path) -> dict[str, Any] | None:
    """A saved state, or None where there is none yet."""
    return torch.load(path, weights_only=True) if path.exists() else None


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Writes a state whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)
