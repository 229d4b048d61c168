"""Measures what adapters keep for backward on a true-size SDXL U-Net, and how long they take on one of 121 M.

    python scripts/bench_memory.py                       # kept for backward: no adapter, peft's forward, ours
    python scripts/bench_memory.py --px 768 --batch 2 --kinds lora dora
    python scripts/bench_memory.py --time --rounds 7     # forward and backward on this machine, in turns

Memory is counted on fake tensors: no card and no weights are needed, and every operation of the U-Net is there. What
counts is each storage once that autograd keeps and that is no parameter.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sdtrain.adapters.attach import AdapterSettings, attach_adapters
from sdtrain.adapters.kinds import AdapterKind
from sdtrain.adapters.targets import select_modules
from sdtrain.families.published_configs import SDXL_UNET

KINDS: tuple[AdapterKind, ...] = ("lora", "dora", "loha", "lokr", "oft")
MID_UNET = {
    **SDXL_UNET,
    "sample_size": 16,
    "block_out_channels": [128, 256, 384],
    "cross_attention_dim": 512,
    "transformer_layers_per_block": [1, 1, 4],
    "attention_head_dim": [8, 16, 24],
    "norm_num_groups": 16,
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 256 + 6 * 32,
}
"""SDXL's U-Net at 121 M parameters, which a processor trains."""


def build(config: dict[str, Any], dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    """Return a frozen U-Net with random weights, on the meta device without any."""
    from diffusers import UNet2DConditionModel
    from diffusers.utils import logging

    logging.set_verbosity_error()
    with torch.device(device):
        network = UNet2DConditionModel.from_config(config).to(dtype)
    assert isinstance(network, nn.Module)
    return network.requires_grad_(False).eval()


def materialise(network: nn.Module) -> None:
    """Put tensors on the processor in the place of those of the meta device; within a fake mode they hold nothing."""
    for module in network.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(module, name, nn.Parameter(empty, parameter.requires_grad))


def attach(network: nn.Module, kind: AdapterKind, rank: int, *, lean: bool) -> list[nn.Parameter]:
    """Put adapters on attention and feed-forward; with peft's own forward where they are not lean."""
    from sdtrain.adapters.lean.layers import make_plain
    from sdtrain.matmul import multiply_fast

    if lean:
        multiply_fast(network)
    modules = select_modules(network, "attention+ff")
    parameters = attach_adapters(network, modules, AdapterSettings(kind, rank, float(rank)), Generator())
    if not lean:
        make_plain(network)
    return list(parameters.values())


def loss_of(network: Any, config: dict[str, Any], px: int, batch: int, dtype: torch.dtype) -> Tensor:
    """Return a loss () of random latents and captions."""
    side, width = px // 8, config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    generator = Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    sizes = {"text_embeds": noise(batch, width), "time_ids": torch.full((batch, 6), float(px), dtype=dtype)}
    latents, captions = noise(batch, 4, side, side), noise(batch, 77, config["cross_attention_dim"])
    if not any(parameter.requires_grad for parameter in network.parameters()):
        latents.requires_grad_()  # so that a network without adapters keeps what is needed to reach its input
    timesteps = torch.full((batch,), 500)
    output = network(latents, timesteps, encoder_hidden_states=captions, added_cond_kwargs=sizes, return_dict=False)[0]
    assert isinstance(output, Tensor)
    return output.float().square().mean()


def kept_for_backward(network: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Return the bytes that autograd keeps of a loss: each storage once, parameters and buffers not counted."""
    own = {each.untyped_storage()._cdata for each in (*network.parameters(), *network.buffers())}
    packed: list[weakref.ref[Tensor]] = []  # weak, for some graphs die before the loss is there

    def keep(tensor: Tensor) -> Tensor:
        packed.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = loss()
    assert held.requires_grad
    storages = [tensor.untyped_storage() for each in packed if (tensor := each()) is not None]
    return sum({each._cdata: each.nbytes() for each in storages if each._cdata not in own}.values())


def print_memory(px: int, batch: int, rank: int, kinds: list[AdapterKind]) -> None:
    """Print what a true-size U-Net keeps, without adapters and with each kind, by peft's forward and by ours."""

    def kept(kind: AdapterKind | None, *, lean: bool) -> float:
        network = build(SDXL_UNET, torch.bfloat16, "meta")
        if kind is not None:
            attach(network, kind, rank, lean=lean)
        with FakeTensorMode():
            materialise(network)
            return kept_for_backward(network, lambda: loss_of(network, SDXL_UNET, px, batch, torch.bfloat16)) / 2**30

    print(f"kept for backward, {px} px, batch {batch}, rank {rank}, attention + feed-forward, bfloat16, GiB")
    print(f"{'without adapter':<16}{kept(None, lean=True):>8.2f}", flush=True)
    print(f"{'':<16}{'peft':>8}{'ours':>8}")
    for kind in kinds:
        print(f"{kind:<16}{kept(kind, lean=False):>8.2f}{kept(kind, lean=True):>8.2f}", flush=True)


def print_times(rank: int, rounds: int, kinds: list[AdapterKind], dtypes: list[torch.dtype]) -> None:
    """Print the seconds of a forward and backward of the U-Net of 121 M, batch 4, 128 px, medians of pairs in turns.

    They are of processor time: on a machine that does other things as well, those do not count.
    """
    for dtype in dtypes:
        for kind in kinds:
            sides = {}
            for lean in (False, True):
                torch.manual_seed(0)
                network = build(MID_UNET, dtype)
                attach(network, kind, rank, lean=lean)
                sides[lean] = network
            seconds: dict[bool, list[float]] = {False: [], True: []}
            for turn in range(rounds + 1):
                for lean in (False, True) if turn % 2 else (True, False):
                    begun = time.process_time()
                    loss_of(sides[lean], MID_UNET, 128, 4, dtype).backward()  # type: ignore[no-untyped-call]
                    if turn:  # the first warms up
                        seconds[lean].append(time.process_time() - begun)
            ratio = statistics.median(plain / lean for plain, lean in zip(*seconds.values(), strict=True))
            plain, lean_s = (statistics.median(found) for found in seconds.values())
            print(
                f"{kind:<6}{str(dtype)[6:]:<10} peft {plain:6.2f} s  ours {lean_s:6.2f} s  {ratio:5.2f} x as fast",
                flush=True,
            )


def main() -> None:
    """Print the tables that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--px", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--time", action="store_true", help="measure time instead of memory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    options = parser.parse_args()
    if options.time:
        print_times(options.rank, options.rounds, options.kinds, [getattr(torch, name) for name in options.dtypes])
    else:
        print_memory(options.px, options.batch, options.rank, options.kinds)


if __name__ == "__main__":
    main()
