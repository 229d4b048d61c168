"""Our forward of adapters in whole networks: what is kept for backward, recomputed, dropped, merged or left to peft."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from sdtrain.adapters.attach import AdapterSettings, attach_adapters, live_layers
from sdtrain.adapters.dropout import AdapterDropout, DropoutRates
from sdtrain.adapters.kinds import AdapterKind
from sdtrain.adapters.lean.inputs import remade
from sdtrain.adapters.lean.layers import make_plain
from sdtrain.adapters.targets import select_modules
from sdtrain.families.adapter_names import ADAPTER

MakeNetworks = Callable[[], dict[str, nn.Module]]
KINDS: list[AdapterKind] = ["lora", "dora", "loha", "lokr"]
BLOCKS = ("*.to_q", "*.to_k", "*.to_v", "*.to_out.0", "*.ff.net.0.proj", "*.ff.net.2")
"""The layers of transformer blocks; what goes into and out of them is a copy of pixels that nobody else keeps."""


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed)).to(dtype)


def run(unet: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """A loss (); its gradient reaches the latents, so that adapters need nothing that would not be kept without."""
    extra = {"text_embeds": noise(2, 32, dtype=dtype), "time_ids": torch.full((2, 6), 64.0, dtype=dtype)}
    latents = noise(2, 4, 8, 8, seed=1, dtype=dtype).requires_grad_()
    captions = noise(2, 7, 64, seed=2, dtype=dtype)
    output = unet(latents, torch.tensor([1, 500]), captions, added_cond_kwargs=extra, return_dict=False)[0]
    loss: Tensor = (output * noise(*output.shape, seed=3)).sum()
    return loss


def attach(network: nn.Module, kind: AdapterKind, patterns: tuple[str, ...] = ()) -> dict[str, nn.Parameter]:
    modules = select_modules(network, patterns or "attention+ff")
    parameters = attach_adapters(network, modules, AdapterSettings(kind, 2, 2.0), Generator().manual_seed(4))
    with torch.no_grad():
        for index, parameter in enumerate(parameters.values()):
            parameter.add_(noise(*parameter.shape, seed=index) * 0.1)
    return parameters


def gradients(network: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    loss.backward()
    found = {name: each.grad.clone() for name, each in network.named_parameters() if each.grad is not None}
    assert found and all(each.any() for each in found.values())
    return found


def require_near(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        assert (ours[name] - wanted).norm() <= tolerance * wanted.norm(), name


@contextmanager
def counting(network: nn.Module) -> Iterator[Callable[[], int]]:
    """Counts bytes that autograd keeps: each storage once, those of parameters not."""
    own = {each.untyped_storage().data_ptr() for each in (*network.parameters(), *network.buffers())}
    packed: list[weakref.ref[Tensor]] = []

    def keep(tensor: Tensor) -> Tensor:
        held = tensor.detach()  # the tensor itself may live on elsewhere
        packed.append(weakref.ref(held))
        return held

    def total() -> int:
        storages = [tensor.untyped_storage() for each in packed if (tensor := each()) is not None]
        return sum({each.data_ptr(): each.nbytes() for each in storages if each.data_ptr() not in own}.values())

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield total


def kept(unet: nn.Module, dtype: torch.dtype) -> int:
    with counting(unet) as total:
        loss = run(unet, dtype)
        found = total()
    assert loss.requires_grad
    return found


def inside(unet: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of what lies between the down and the up matrices of all LoRAs, `rank` numbers a position."""
    sizes: list[int] = []

    def see(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        down = layer.lora_A[ADAPTER]
        sizes.append(inputs[0].numel() // down.in_features * down.out_features * dtype.itemsize)

    hooks = [each.register_forward_pre_hook(see) for each in unet.modules() if hasattr(each, "lora_A")]
    run(unet, dtype)
    for hook in hooks:
        hook.remove()
    assert sizes
    return sum(sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_keep_no_activation_that_is_not_kept_without_them(
    make_networks: MakeNetworks, kind: AdapterKind, dtype: torch.dtype
) -> None:
    unet = make_networks()["unet"].to(dtype)
    before = kept(unet, dtype)
    parameters = attach(unet, kind, BLOCKS)
    after = kept(unet, dtype)
    captions = 2 * 7 * 64 * dtype.itemsize  # which keys and values share, and the base layers need not keep
    factors = 0
    if kind == "lora":  # what is inside, and the matrices in the activations' type
        factors = inside(unet, dtype) + sum(each.numel() for each in parameters.values()) * dtype.itemsize
    if kind == "dora":  # a length of each output
        factors = sum(each.numel() * 4 for name, each in parameters.items() if "magnitude" in name)
    if kind == "lokr":  # the scaled factor, and one that is a product of two
        factors = sum(max(each.numel(), 64) * 4 for each in parameters.values())
    assert after <= before + captions + factors
    make_plain(unet)
    assert kept(unet, dtype) > 1.1 * after, "peft keeps copies, or this test counts nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_a_whole_network_are_those_of_peft(make_networks: MakeNetworks, kind: AdapterKind) -> None:
    """Through inputs that are computed again from what normalisations and gates keep."""
    unet = make_networks()["unet"]
    attach(unet, kind)
    unet.double()
    ours = gradients(unet, run(unet, torch.float64))
    make_plain(unet)
    require_near(ours, gradients(unet, run(unet, torch.float64)), 1e-10)


def test_gradients_in_text_encoders_are_those_of_peft(make_networks: MakeNetworks) -> None:
    network = make_networks()["text_encoder"]
    attach(network, "lora")
    network.double()
    tokens = torch.arange(32).view(2, 16)

    def loss() -> Tensor:
        hidden: Tensor = network(tokens).last_hidden_state
        return hidden.square().sum()

    ours = gradients(network, loss())
    make_plain(network)
    require_near(ours, gradients(network, loss()), 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_activations_change_no_bit(make_networks: MakeNetworks, kind: AdapterKind) -> None:
    unet: Any = make_networks()["unet"]
    attach(unet, kind)
    plain = gradients(unet, run(unet))
    unet.enable_gradient_checkpointing()
    unet.train()  # in which diffusers recomputes; the network has no dropout
    again = gradients(unet, run(unet))
    assert all(torch.equal(again[name], wanted) for name, wanted in plain.items())


@pytest.mark.parametrize("kind", ["lora", "rslora"])
@pytest.mark.parametrize("rates", [DropoutRates(neurons=0.3), DropoutRates(ranks=0.3), DropoutRates(modules=0.3)])
def test_dropout_is_that_of_peft(kind: AdapterKind, rates: DropoutRates) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(2), nn.Linear(16, 12)).requires_grad_(False)
    attach(network, kind, ("0", "2"))
    network.double()
    pixels = noise(5, 3, 6, 6, dtype=torch.float64)

    def found() -> dict[str, Tensor]:
        dropout = AdapterDropout([network], rates)
        with dropout.drawn(lambda index: Generator().manual_seed(9), [(0, row) for row in range(5)]):
            return gradients(network, network(pixels).pow(3).sum())

    ours = found()
    make_plain(network)
    require_near(ours, found(), 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_disabled_adapters_are_left_to_peft(kind: AdapterKind) -> None:
    network = nn.Sequential(nn.Linear(16, 12)).requires_grad_(False)
    plain = copy.deepcopy(network)
    attach(network, kind, ("0",))
    inputs = noise(5, 16)
    live, (layer,) = network(inputs), live_layers(network)
    assert not torch.allclose(live, plain(inputs), atol=1e-3)
    layer.merge()  # type: ignore[operator]
    torch.testing.assert_close(network(inputs), live, rtol=1e-4, atol=1e-5)
    layer.unmerge()  # type: ignore[operator]
    torch.testing.assert_close(network(inputs), live, rtol=1e-4, atol=1e-5)
    layer.enable_adapters(False)  # type: ignore[operator]
    torch.testing.assert_close(network(inputs), plain(inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_trains_as_with_peft(kind: AdapterKind) -> None:
    network = nn.Sequential(nn.Linear(16, 12)).requires_grad_(False)
    attach(network, kind, ("0",))
    inputs = noise(5, 16)

    def found() -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = network(inputs).float().square().sum()
        return gradients(network, loss)

    ours = found()
    make_plain(network)
    assert all(torch.equal(ours[name], wanted) for name, wanted in found().items())


def test_a_layer_that_is_no_plain_one_is_left_to_peft() -> None:
    grouped = nn.Sequential(nn.Conv2d(8, 8, 3, padding="same")).requires_grad_(False)
    attach(grouped, "lora", ("0",))
    assert not any(type(module).__name__.startswith("Lean") for module in grouped.modules())
    gradients(grouped, grouped(noise(1, 8, 5, 5)).square().sum())


def test_an_input_that_was_written_to_is_kept_itself() -> None:
    """A mark says what a tensor was when it was made."""
    network = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)).requires_grad_(False)
    attach(network, "lora", ("1",))
    normalised = network[0](noise(3, 8).requires_grad_())
    assert remade(normalised) is not None
    assert remade(normalised + 1) is None
    normalised += 1
    assert remade(normalised) is None
    with torch.no_grad():
        assert remade(network[0](noise(3, 8))) is None, "where nothing is kept, a mark would keep the input alive"


def test_a_normalisation_that_is_trained_is_not_marked() -> None:
    network = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    network[1].requires_grad_(False)
    attach(network, "lora", ("1",))
    assert remade(network[0](noise(3, 8).requires_grad_())) is not None, "attaching freezes everything else"


def test_half_a_batch_without_gradients_of_inputs_trains(make_networks: MakeNetworks) -> None:
    """The first adapted layer, and keys and values of frozen captions, have inputs that want no gradient."""
    network = nn.Sequential(nn.Linear(16, 12), nn.Conv1d(5, 5, 1)).requires_grad_(False)
    for kind in KINDS:
        fresh = copy.deepcopy(network)
        attach(fresh, kind, ("0",))
        assert gradients(fresh, fresh(noise(2, 5, 16)).square().sum())
