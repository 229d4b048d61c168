"""Ranks: under DDP d is bit-equal everywhere, and sharded (FSDP2) training equals the unsharded run. Two gloo
processes."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from optim import ProdigyPlusScheduleFree, averaged

STEPS = 20
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {}),
    "fsdp": ("fsdp", {}),
    "fsdp joint": ("fsdp", {"schedulefree_c": 8.0, "split_groups": False}),
    "fsdp with StableAdamW": ("fsdp", {"eps": 1e-8, "weight_decay": 0.01}),
    "fsdp compiled": ("fsdp", {"compile": True}),
    "fsdp speed": ("fsdp", {"use_speed": True}),
    "fsdp first moment": ("fsdp", {"use_schedulefree": False, "eps": 1e-8}),
}


class Net(nn.Module):
    """Wide, tall, convolution, uneven rows (7 on two ranks), one row (the second rank has none), zeros, a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 33, 3, padding=1)
        self.tall = nn.Linear(33, 64)
        self.wide = nn.Linear(64, 7)
        self.zero = nn.Linear(7, 40, bias=False)
        self.one = nn.Linear(40, 1)
        nn.init.zeros_(self.zero.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).mean((2, 3))
        x = torch.tanh(self.wide(torch.relu(self.tall(x))))
        out: Tensor = self.one(self.zero(x) + 1.0)
        return out


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 4, 6, 6, generator=generator)
    return x, x.mean((1, 2, 3), keepdim=True).flatten(1) * 3 + 1


def build(net: nn.Module, **settings: Any) -> ProdigyPlusScheduleFree:
    params = list(net.parameters())
    groups = [{"params": params[:4], "name": "unet"}, {"params": params[4:], "name": "text", "lr": 0.5}]
    return ProdigyPlusScheduleFree(groups, **{"d0": 1e-3, **settings})


def train(net: nn.Module, optimizer: ProdigyPlusScheduleFree) -> None:
    """Every rank sees the whole batch: then gradients are those of one rank to the bit, and only the optimizer is
    tested."""
    for step in range(STEPS):
        x, target = batch(step)
        (net(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(t: Tensor) -> Tensor:
    return t.full_tensor().detach() if isinstance(t, DTensor) else t.detach()


def work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name, (kind, settings) in CASES.items():
        torch.save(run_case(rank, kind, settings), Path(folder) / f"{name}.{rank}.pt")
    dist.destroy_process_group()


def run_case(rank: int, kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    net: nn.Module = Net()
    if kind == "ddp":
        net = DistributedDataParallel(net)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for module in (net.conv, net.tall, net.wide, net.zero, net.one):
            fully_shard(module, mesh=mesh)
        fully_shard(net, mesh=mesh)
    optimizer = build(net, **settings)
    train(net, optimizer)
    y = [whole(p).clone() for p in net.parameters()]
    local = [p.to_local().clone() if isinstance(p, DTensor) else p.detach().clone() for p in net.parameters()]
    with averaged(optimizer):
        x = [whole(p).clone() for p in net.parameters()]
    after = [p.to_local() if isinstance(p, DTensor) else p.detach() for p in net.parameters()]
    exact = all(torch.equal(a, b) for a, b in zip(local, after, strict=True))
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    if rank == 1:
        grad = net.wide.weight.grad if kind == "fsdp" else next(iter(net.parameters())).grad
        (grad.to_local() if isinstance(grad, DTensor) else grad).fill_(float("nan"))
    if kind == "fsdp":  # DDP would have spread it in backward
        optimizer.step()
    metrics = [(m.d, m.applied_d, m.k, m.skipped) for m in optimizer.metrics()]
    same = all(torch.equal(whole(p), before) for p, before in zip(net.parameters(), y, strict=True))
    return {"y": y, "x": x, "metrics": metrics, "exact": exact, "untouched": same}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases in one pair of processes: starting them is what takes the time."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, args=(port, str(folder)), nprocs=2)
    return folder


def alone(settings: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], list[float]]:
    torch.manual_seed(0)
    net = Net()
    optimizer = build(net, **settings)
    train(net, optimizer)
    y = [p.detach().clone() for p in net.parameters()]
    with averaged(optimizer):
        x = [p.detach().clone() for p in net.parameters()]
    return y, x, [m.d for m in optimizer.metrics()]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one_does_and_agree_on_d_to_the_bit(name: str, two_ranks: Path) -> None:
    kind, settings = CASES[name]
    first, second = (torch.load(two_ranks / f"{name}.{rank}.pt") for rank in range(2))
    assert first["metrics"] == second["metrics"]
    assert first["exact"] and second["exact"], "the shards of y must come back bit for bit"
    y, x, d = alone(settings)
    torch.testing.assert_close([m[0] for m in first["metrics"]], d, rtol=1e-5, atol=0)
    for mine, theirs in ((y, first["y"]), (x, first["x"]), (y, second["y"])):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=2e-6)
    if kind == "fsdp":
        assert first["untouched"] and second["untouched"], "a gradient that is not finite on one rank stops all ranks"
        assert [m[3] for m in first["metrics"]] == [1, 1]
