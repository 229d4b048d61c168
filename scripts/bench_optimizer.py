"""Measures a step of this project's optimizer beside its peers, on the shapes of SDXL, all in one run.

    python scripts/bench_optimizer.py                         # LoRA on attention, float32 and bfloat16
    python scripts/bench_optimizer.py --sets lora-all unet --dtypes bf16 --rounds 15

Peers take turns, round after round, so that a busy machine slows all of them alike; medians and the ratio to fused
AdamW are printed. On CUDA times come from events, kernels are counted by the profiler, and achieved bytes/s are set
against a copy measured in the same run.
"""

import argparse
import contextlib
import gc
import io
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from optim import ProdigyPlusScheduleFree

Shape = tuple[int, ...]
Build = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
SYNCS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")


def transformer_blocks() -> Iterator[int]:
    """Yield the width of each of the 70 transformer blocks of SDXL's U-Net."""
    yield from [640] * (2 * 2 + 3 * 2) + [1280] * (2 * 10 + 10 + 3 * 10)


def lora_shapes(rank: int, *, all_linear: bool) -> list[Shape]:
    """Return down (rank, in) and up (out, rank) for each adapted matrix of SDXL's U-Net."""
    shapes: list[Shape] = []
    for width in transformer_blocks():
        inputs = [width] * 4 + [width, 2048, 2048, width]  # self-attention q k v out, cross-attention q k v out
        pairs = [(size, width) for size in inputs]
        if all_linear:
            pairs += [(width, 8 * width), (4 * width, width)]  # gated feed-forward
        for fan_in, fan_out in pairs:
            shapes += [(rank, fan_in), (fan_out, rank)]
    return shapes


def unet_shapes(max_elements: int) -> list[Shape]:
    """Return the shapes of SDXL's full U-Net (2.57 B parameters), each in proportion, up to `max_elements` elements."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(5, 10, 20),
            transformer_layers_per_block=(1, 2, 10),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    counts = Counter(tuple(p.shape) for p in unet.parameters())
    total = sum(torch.Size(shape).numel() * count for shape, count in counts.items())
    share = min(1.0, max_elements / total)
    return [shape for shape, count in counts.items() for _ in range(max(1, round(count * share)))]


@dataclass
class Peer:
    """One optimizer that is measured: its name, and how it is built from groups of parameters."""

    name: str
    build: Build


def peers(device: str, chosen: list[str] | None) -> list[Peer]:
    """Return everybody who is measured; packages that are not installed are left out."""
    found = [
        Peer("AdamW fused", lambda groups: torch.optim.AdamW(groups, fused=True)),
        Peer("AdamW foreach", lambda groups: torch.optim.AdamW(groups, foreach=True)),
    ]
    with contextlib.suppress(ImportError):
        from schedulefree import AdamWScheduleFree

        found.append(Peer("schedulefree foreach", lambda groups: train_mode(AdamWScheduleFree(groups, foreach=True))))
    with contextlib.suppress(ImportError):
        from prodigyopt import Prodigy

        found.append(Peer("prodigyopt", lambda groups: Prodigy(groups)))
    with contextlib.suppress(ImportError):
        from prodigyplus.prodigy_plus_schedulefree import ProdigyPlusScheduleFree as Upstream

        found.append(Peer("prodigy-plus eps", lambda groups: Upstream(groups, split_groups_mean=True)))
        found.append(Peer("prodigy-plus atan2", lambda groups: Upstream(groups, split_groups_mean=True, eps=None)))
    found.append(Peer("ours plain eps", lambda groups: ProdigyPlusScheduleFree(groups, eps=1e-8, compile=False)))
    found.append(Peer("ours plain atan2", lambda groups: ProdigyPlusScheduleFree(groups, compile=False)))
    found.append(Peer("ours eps", lambda groups: ProdigyPlusScheduleFree(groups, eps=1e-8, compile=True)))
    found.append(Peer("ours atan2", lambda groups: ProdigyPlusScheduleFree(groups, compile=True)))
    return [peer for peer in found if chosen is None or any(part in peer.name for part in chosen)]


def train_mode(optimizer: Any) -> Any:
    """Put an optimizer that has modes into the mode for training and return it."""
    optimizer.train()
    return optimizer


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's is untyped
    """Counts operations as they reach ATen, and those that make the host wait for a device.

    Reading a tensor that is in the host's own memory is free.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops = 0
        self.syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        self.ops += not any(view in name for view in ("view", "detach", "alias"))
        self.syncs += name in SYNCS and any(isinstance(t, Tensor) and t.device.type != "cpu" for t in args)
        return func(*args, **(kwargs or {}))


@dataclass
class Candidate:
    """A peer with parameters of its own, in the middle of its measurement."""

    peer: Peer
    optimizer: torch.optim.Optimizer
    params: list[nn.Parameter]
    first_s: float
    times_ms: list[float]
    ops: int = 0
    syncs: int = 0
    kernels: int = 0  # on CUDA


def prepare(peer: Peer, shapes: list[Shape], dtype: torch.dtype, device: str, zero_columns: int) -> Candidate:
    """Build a peer on fresh parameters with gradients, time its first step and count the operations of the second."""
    generator = torch.Generator().manual_seed(0)
    weights = {shape: torch.randn(shape, generator=generator) * 0.02 for shape in sorted(set(shapes))}
    for shape, weight in weights.items():
        if len(shape) == 2 and shape[1] == zero_columns:
            weight.zero_()  # LoRA's up matrices start at zero
    params = [nn.Parameter(weights[shape].to(device, dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).mul_(1e-3).to(device, dtype)
    half = len(params) // 2
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer = peer.build([{"params": params[:half]}, {"params": params[half:]}])
        start = time.perf_counter()
        optimizer.step()
        wait(device)
        first = time.perf_counter() - start
        candidate = Candidate(peer, optimizer, params, first, [])
        with Counting() as counting:
            optimizer.step()
    candidate.ops, candidate.syncs = counting.ops, counting.syncs
    if device == "cuda":
        candidate.kernels = kernels_of_a_step(optimizer)
    return candidate


def kernels_of_a_step(optimizer: torch.optim.Optimizer) -> int:
    """Return how many kernels the device runs in a step, copies included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_type.name == "CUDA")


def wait(device: str) -> None:
    """Wait until the device has done all that it was given; on a CPU there is nothing to wait for."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed_step(candidate: Candidate, device: str) -> float:
    """Return the milliseconds that one step takes."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        candidate.optimizer.step()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end))
    start = time.perf_counter()
    candidate.optimizer.step()
    return (time.perf_counter() - start) * 1e3


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of the tensors in the optimizer's state."""
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def copy_bandwidth(device: str) -> float:
    """Return the GB/s, read and written, of a plain copy of 256 MiB."""
    source = torch.empty(1 << 26, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        wait(device)
        start = time.perf_counter()
        target.copy_(source)
        wait(device)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(times) / 1e9


def minimal_bytes(optimizer: ProdigyPlusScheduleFree, params: list[nn.Parameter]) -> float:
    """Return the bytes that a step cannot but move.

    g is read twice (the first time to see that it is finite), y and z are read and written.
    """
    element = params[0].element_size()
    num = sum(p.numel() for p in params)
    return num * 6 * element + 2 * (state_bytes(optimizer) - num * element)


def run(name: str, shapes: list[Shape], dtype: torch.dtype, options: argparse.Namespace) -> None:
    """Measure all peers on one set of shapes in one type, and print a table."""
    device, rounds, chosen = options.device, options.rounds, options.peers
    zero_columns = options.rank if name.startswith("lora") else 0
    num = sum(torch.Size(shape).numel() for shape in shapes)
    kinds = len(set(shapes))
    print(f"\n{name}, {dtype}, {len(shapes)} tensors of {kinds} shapes, {num / 1e6:.1f} M parameters, {device}")
    candidates = []
    for peer in peers(device, chosen):
        gc.collect()
        candidates.append(prepare(peer, shapes, dtype, device, zero_columns))
    for _ in range(rounds):
        for candidate in candidates:
            # the slowest peers would take most of the time for no better median
            if len(candidate.times_ms) < 3 or candidate.times_ms[0] < 2000:
                with contextlib.redirect_stdout(io.StringIO()):
                    candidate.times_ms.append(timed_step(candidate, device))
    base = statistics.median(candidates[0].times_ms)
    columns = {"ms": 9, "ratio": 8, "min": 9, "ops": 8, "syncs": 7, "kernels": 9, "B/param": 9, "first s": 9, "GB/s": 8}
    print(" " * 22 + "".join(f"{column:>{width}}" for column, width in columns.items()))
    for c in candidates:
        median = statistics.median(c.times_ms)
        rate = ""
        if isinstance(c.optimizer, ProdigyPlusScheduleFree):
            rate = f"{minimal_bytes(c.optimizer, c.params) / median / 1e6:.1f}"
        kernels, syncs = (str(c.kernels), str(c.syncs)) if device == "cuda" else ("", "")
        print(
            f"{c.peer.name:22}{median:9.1f}{median / base:8.2f}{min(c.times_ms):9.1f}{c.ops:8}{syncs:>7}{kernels:>9}"
            f"{state_bytes(c.optimizer) / num:9.2f}{c.first_s:9.2f}{rate:>8}"
        )


def main() -> None:
    """Read the command line and measure every set of shapes in every type that it names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=["lora"], choices=["lora", "lora-all", "unet"])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--peers", nargs="+", help="only those whose name contains one of these")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--unet-elements", type=int, default=150_000_000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, copy {copy_bandwidth(options.device):.1f} GB/s"
    )
    sets = {
        "lora": lambda: lora_shapes(options.rank, all_linear=False),
        "lora-all": lambda: lora_shapes(options.rank, all_linear=True),
        "unet": lambda: unet_shapes(options.unet_elements),
    }
    for name in options.sets:
        for dtype in options.dtypes:
            chosen = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
            run(name, sets[name](), chosen, options)


if __name__ == "__main__":
    main()
