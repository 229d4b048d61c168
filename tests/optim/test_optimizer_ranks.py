"""Ranks: under DDP d is bit-equal everywhere, and sharded (FSDP2) training equals the unsharded run. Two gloo
processes."""

import socket
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from optim import Piece, ProdigyPlusScheduleFree, averaged, flatten_state, in_turn
from optim.ranks import gathering
from optim.steps.stacks import Kind, Split
from tests.forked import forking

STEPS = 20
STEPS_AFTER = 4
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


def train(net: nn.Module, optimizer: ProdigyPlusScheduleFree, steps: int = STEPS) -> None:
    """Every rank sees the whole batch: then gradients are those of one rank to the bit, and only the optimizer is
    tested."""
    for step in range(steps):
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
    found = {"y": y, "x": x, "metrics": metrics, "exact": exact, "untouched": same}
    return found if kind == "ddp" else {**found, **run_on(net, optimizer, settings)}


def run_on(net: nn.Module, optimizer: ProdigyPlusScheduleFree, settings: dict[str, Any]) -> dict[str, Any]:
    """The run goes on for a few steps by itself, and from the whole state: are they the same to the bit?"""
    state = optimizer.whole_state_dict()
    with averaged(optimizer):
        lent = optimizer.whole_state_dict()
    nobody = optimizer.whole_state_dict(keep=False)
    assert state is not None and lent is not None and nobody is None
    weights = [p.detach().clone() for p in net.parameters()]
    optimizer.zero_grad()
    train(net, optimizer, STEPS_AFTER)
    ends = [locally(net, optimizer)]
    for whole_state in (state, lent):
        with torch.no_grad():
            for p, w in zip(net.parameters(), weights, strict=True):
                p.copy_(w)
        resumed = build(net, **settings)
        resumed.load_state_dict(whole_state)
        resumed.train()
        train(net, resumed, STEPS_AFTER)
        ends.append(locally(net, resumed))
    exact = [all(torch.equal(end[name], ends[0][name]) for name in ends[0]) for end in ends[1:]]
    found = {"state": state, "resumed exactly": exact, "end": [whole(p).clone() for p in net.parameters()]}
    for tensors in optimizer.state.values():
        tensors["z"].fill_(-0.0)
    state = optimizer.whole_state_dict()
    assert state is not None
    return found | {"signs": all(bool(tensors["z"].signbit().all()) for tensors in state["state"].values())}


def locally(net: nn.Module, optimizer: ProdigyPlusScheduleFree) -> dict[str, Tensor]:
    """Everything that is on this rank after a run."""
    tensors, _ = flatten_state(optimizer.state_dict())
    return tensors | {name: p.to_local().detach().clone() for name, p in net.named_parameters()}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases in one pair of processes: starting them is what takes the time."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    forking()
    mp.start_processes(work, args=(port, str(folder)), nprocs=2, start_method="forkserver")
    return folder


def alone(settings: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], list[float]]:
    net, optimizer = trained_alone(settings)
    y = [p.detach().clone() for p in net.parameters()]
    with averaged(optimizer):
        x = [p.detach().clone() for p in net.parameters()]
    return y, x, [m.d for m in optimizer.metrics()]


def trained_alone(settings: dict[str, Any]) -> tuple[Net, ProdigyPlusScheduleFree]:
    torch.manual_seed(0)
    net = Net()
    optimizer = build(net, **settings)
    train(net, optimizer)
    return net, optimizer


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


SHARDED = [name for name, (kind, _) in CASES.items() if kind == "fsdp"]


@pytest.mark.parametrize("name", SHARDED)
def test_two_ranks_go_on_from_the_whole_state_bit_for_bit(name: str, two_ranks: Path) -> None:
    for rank in range(2):
        found = torch.load(two_ranks / f"{name}.{rank}.pt")
        assert found["resumed exactly"] == [True, True], "at y, and with x lent"
        assert found["signs"], "the sign of a zero is a bit, too"


@pytest.mark.parametrize("name", SHARDED)
def test_the_whole_state_of_two_ranks_is_that_of_one_and_one_goes_on_from_it(name: str, two_ranks: Path) -> None:
    _, settings = CASES[name]
    saved = torch.load(two_ranks / f"{name}.0.pt")
    _, optimizer = trained_alone(settings)
    state = optimizer.state_dict()["state"]
    assert state.keys() == saved["state"]["state"].keys()
    for index, tensors in state.items():
        found = saved["state"]["state"][index]
        assert tensors.keys() == found.keys()
        for field, tensor in tensors.items():
            assert tensor.dtype == found[field].dtype
            rtol = 2**-7 if tensor.dtype == torch.bfloat16 else 1e-4 if field in ("row", "col", "v", "norms") else 1e-5
            atol = 2e-6 if field == "z" else 1e-5 * float(tensor.abs().max())
            torch.testing.assert_close(found[field], tensor, rtol=rtol, atol=atol)

    net = Net()
    with torch.no_grad():
        for p, y in zip(net.parameters(), saved["y"], strict=True):
            p.copy_(y)
    resumed = build(net, **settings)
    resumed.load_state_dict(saved["state"])
    train(net, resumed, STEPS_AFTER)
    for p, end in zip(net.parameters(), saved["end"], strict=True):
        torch.testing.assert_close(p.detach(), end, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("shape", [(7, 40), (64, 33), (40, 4, 3, 3), (2, 40, 40), (5,)])
def test_the_parts_of_any_number_of_ranks_are_the_whole(shape: tuple[int, ...], num_ranks: int) -> None:
    whole_shape = torch.Size(shape)
    values = torch.arange(whole_shape.numel()).view(shape)
    rows = -(-shape[0] // num_ranks)
    found: dict[str, list[Tensor]] = {"z": [], "s": []}
    for rank in range(num_ranks):
        first = min(rows * rank, shape[0])
        here = values[first : first + rows]
        offset = first * whole_shape[1:].numel()
        split = Split(None, first)  # type: ignore[arg-type]
        kind = Kind(0, here.shape, whole_shape, split, offset, torch.float32, None, starts_at_zero=False)
        found["z"].append(gathering.part_here("z", values, kind))
        found["s"].append(gathering.part_here("s", values.view(-1)[::11], kind))
        assert torch.equal(found["z"][-1], here)
        assert torch.equal(found["s"][-1], kind.sliced(here.reshape(1, -1))[0])
    assert torch.equal(torch.cat(found["z"]), values)
    assert torch.equal(torch.cat(found["s"]), values.view(-1)[::11])


@given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 100))
def test_pieces_have_their_turn_in_order_and_no_more_at_once_than_allowed(sizes: list[int], limit: int) -> None:
    pieces = [(str(number), Piece(torch.empty(size), torch.Size((size,)))) for number, size in enumerate(sizes)]
    turns = list(in_turn(pieces, limit))
    assert [name for turn in turns for name in turn] == [name for name, _ in pieces]
    for turn in turns:
        assert len(turn) == 1 or sum(piece.num_bytes for piece in turn.values()) <= limit
    for turn, following in pairwise(turns):
        first = next(iter(following.values()))
        assert sum(piece.num_bytes for piece in turn.values()) + first.num_bytes > limit, "no turn more than needed"
