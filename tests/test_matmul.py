"""Products of matrices by oneDNN are those of torch, forward and backward, and only where they are worth it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sdtrain import matmul
from sdtrain.adapters.attach import AdapterSettings, attach_adapters
from sdtrain.adapters.lean.layers import LEAN, make_plain
from sdtrain.adapters.quantised.layer import QuantisedLinear, quantise
from sdtrain.config.schema import ModelConfig
from sdtrain.models import latent_diffusion
from sdtrain.models.checkpoints.inspect import open_model
from sdtrain.models.load import load_model
from sdtrain.models.sdxl import SDXL

ROWS, IN, OUT = 96, 160, 192
"""Sizes of a product that is worth it."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(sizes, generator=generator(seed))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Take this processor for one that oneDNN is faster on; lists the sizes of the products that it was asked for."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    sizes: list[tuple[int, ...]] = []
    ours = matmul._by_onednn

    def counted(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        sizes.append((*inputs.shape, weight.shape[0]))
        return ours(inputs, weight, bias)

    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(matmul, "_by_onednn", counted)
    yield sizes


def close(found: Tensor | None, wanted: Tensor | None) -> None:
    """A sum of n products in float32 is off by less than this from that in float64."""
    assert (found is None) == (wanted is None)
    if found is not None and wanted is not None:
        torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=2e-6 * float(wanted.abs().max()))


@given(leading=st.sampled_from([(ROWS,), (4, 24), (2, 3, 16)]), data=st.data())
def test_a_product_and_its_gradients_are_those_in_float64(leading: tuple[int, ...], data: st.DataObject) -> None:
    wanted = [data.draw(st.booleans(), label=name) for name in ("inputs", "weight", "bias")]
    biased, apart = data.draw(st.booleans(), label="biased"), data.draw(st.booleans(), label="apart")
    inputs, weight, bias = normal(*leading, 2 * IN), normal(OUT, IN, seed=1), normal(OUT, seed=2)
    inputs = inputs[..., ::2] if apart else inputs[..., :IN].contiguous()
    here = [one.clone() if not apart else one for one in (inputs, weight, bias)][: 3 if biased else 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul, "onednn_is_faster", lambda: hasattr(torch.ops.mkldnn, "_linear_pointwise"))
        found = outcome(matmul.linear, here, wanted)
    there = outcome(nn.functional.linear, [one.double() for one in here], wanted)
    for one, other in zip(found, there, strict=True):
        close(one, other)


def outcome(function: object, tensors: list[Tensor], wanted: list[bool]) -> list[Tensor | None]:
    """The product, and the gradients of the tensors that are wanted."""
    assert callable(function)
    leaves = [one.detach().requires_grad_(want) for one, want in zip(tensors, wanted, strict=False)]
    output = function(*leaves)
    if output.requires_grad:
        output.backward(normal(*output.shape, seed=3).to(output.dtype))
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def test_the_plain_products_are_those_in_float64(asked: list[tuple[int, ...]]) -> None:
    left, right, gradient = normal(4, 24, IN), normal(IN, OUT, seed=1), normal(4, 24, OUT, seed=2)
    close(matmul.matmul(left, right), left.double() @ right.double())
    close(matmul.weight_gradient(gradient, left), torch.einsum("abo,abi->oi", gradient.double(), left.double()))
    total = normal(4, 24, OUT, seed=3)
    wanted = total.double() + left.double() @ right.double()
    assert matmul.add_matmul(total, left, right) is total
    close(total, wanted)
    assert asked == [(4, 24, IN, OUT), (OUT, ROWS, IN), (4, 24, IN, OUT)]


def test_the_same_numbers_give_the_same_bits(asked: list[tuple[int, ...]]) -> None:
    """Wherever they lie, and whatever rows are beside them: a preview is what `sample` draws."""
    inputs, weight = normal(2 * ROWS, IN), normal(OUT, IN, seed=1)
    once = matmul.linear(inputs, weight)
    assert torch.equal(once, matmul.linear(inputs.clone(), weight.clone()))
    assert torch.equal(once[:ROWS], matmul.linear(inputs[:ROWS].clone(), weight))
    assert len(asked) == 3


@pytest.mark.parametrize("change", ["small", "bfloat16", "float64", "autocast", "no numbers", "elsewhere", "a type"])
def test_everything_else_is_left_to_torch(asked: list[tuple[int, ...]], change: str) -> None:
    class Own(Tensor):
        pass

    inputs, weight = normal(ROWS, IN), normal(OUT, IN, seed=1)
    if change == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert matmul.linear(inputs, weight).dtype == torch.bfloat16
    elif change == "no numbers":
        with FakeTensorMode() as mode:
            matmul.linear(mode.from_tensor(inputs), mode.from_tensor(weight))
    else:
        changed = {
            "small": inputs[:4],
            "bfloat16": inputs.bfloat16(),
            "float64": inputs.double(),
            "elsewhere": inputs.to("meta"),
            "a type": inputs.as_subclass(Own),
        }[change]
        found = matmul.linear(changed, weight.to(changed.device, changed.dtype))
        assert found.dtype == changed.dtype and type(found) is type(changed)
    assert not asked


def test_narrow_factors_are_left_to_torch_where_onednn_would_copy(asked: list[tuple[int, ...]]) -> None:
    """The gradients of the matrices of a LoRA, and what it adds to the product of the frozen weight."""
    inputs, hidden, up = normal(4096, 640), normal(4096, 16, seed=1), normal(16, 640, seed=2)
    close(matmul.weight_gradient(hidden, inputs), hidden.double().T @ inputs.double())
    wanted = inputs.double() + hidden.double() @ up.double()
    close(matmul.add_matmul(inputs, hidden, up), wanted)
    assert not asked


def test_a_frozen_layer_keeps_no_inputs_for_backward(asked: list[tuple[int, ...]]) -> None:
    layer = nn.Sequential(nn.Linear(IN, OUT))
    matmul.multiply_fast(layer)
    layer.requires_grad_(False)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(tuple(one.shape)) or one, lambda one: one):
        layer(normal(ROWS, IN).requires_grad_()).sum().backward()
    assert kept == [(OUT, IN)]
    assert asked == [(ROWS, IN, OUT), (ROWS, OUT, IN)]


def test_a_product_without_a_backward_is_not_given_to_autograd(asked: list[tuple[int, ...]]) -> None:
    with pytest.raises(AssertionError, match="no backward"):
        matmul.matmul(normal(ROWS, IN).requires_grad_(), normal(IN, OUT, seed=1))


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr", "oft"])
def test_adapters_sit_on_fast_layers_as_on_plain_ones(asked: list[tuple[int, ...]], kind: str) -> None:
    gradients = []
    for fast in (True, False):
        network = nn.Sequential(nn.Linear(IN, OUT), nn.SiLU(), nn.Linear(OUT, OUT))
        for seed, parameter in enumerate(network.parameters()):
            parameter.data = normal(*parameter.shape, seed=seed) / 12
        if fast:
            matmul.multiply_fast(network)
        before = network(normal(ROWS, IN, seed=9)).detach()
        settings = AdapterSettings(kind, 16, 16.0)  # type: ignore[arg-type]
        adapters = attach_adapters(network, ["0", "2"], settings, generator())
        assert kind == "oft" or all(type(network[at]) in LEAN.values() for at in (0, 2))
        close(network(normal(ROWS, IN, seed=9)).detach(), before.double())
        for seed, parameter in enumerate(adapters.values()):
            parameter.data += normal(*parameter.shape, seed=seed) / 50
        if not fast:
            make_plain(network.double())
        asked.clear()
        network(normal(ROWS, IN, seed=9).to(next(network.parameters()).dtype)).square().sum().backward()
        assert bool(asked) == fast
        gradients.append([parameter.grad for parameter in adapters.values()])
    for found, wanted in zip(*gradients, strict=True):
        assert found is not None and wanted is not None
        torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("processor", "capability", "faster"),
    [
        ("vendor_id\t: AuthenticAMD", "AVX512", True),
        ("AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD", "AVX512", True),
        ("vendor_id\t: AuthenticAMD", "AVX2", False),
        ("vendor_id\t: GenuineIntel", "AVX512", False),
        ("arm", "DEFAULT", False),
    ],
)
def test_onednn_multiplies_on_processors_of_amd(
    monkeypatch: pytest.MonkeyPatch, processor: str, capability: str, faster: bool
) -> None:
    if not torch.backends.mkl.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has not both of them")
    monkeypatch.setattr(matmul, "_processor", lambda: processor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert matmul.onednn_is_faster.__wrapped__() == faster


def test_the_maker_of_this_processor_is_told() -> None:
    assert matmul._processor()


def test_a_processor_that_a_sandbox_hides_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(*_: object, **__: object) -> str:
        raise PermissionError

    monkeypatch.setattr(Path, "read_text", hidden)
    monkeypatch.setattr("platform.processor", lambda: "AuthenticAMD by another way")
    assert matmul._processor() == "AuthenticAMD by another way"


def test_fast_layers_are_packed_as_plain_ones(asked: list[tuple[int, ...]]) -> None:
    network = nn.Sequential(nn.Linear(IN, OUT))
    matmul.multiply_fast(network)
    quantise(network, "int8", torch.device("cpu"), lambda name: network.get_parameter(name))
    inputs = normal(ROWS, IN).requires_grad_()
    network(inputs).sum().backward()
    assert type(network[0]) is QuantisedLinear
    assert asked == [(ROWS, IN, OUT), (ROWS, OUT, IN)]


def built_in() -> SDXL:
    config = ModelConfig(path="builtin:tiny-sdxl")
    model = load_model(open_model(config, "model"), config, device=torch.device("cpu"), dtype=torch.float32)
    assert isinstance(model, SDXL)
    return model


def test_every_linear_layer_of_a_loaded_model_multiplies_fast() -> None:
    model = built_in()
    for name, network in model.networks.items():
        layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
        assert layers and all(type(module) is matmul.Linear for module in layers), name


@pytest.mark.parametrize(("device", "inside"), [("cuda", "high"), ("cpu", "highest")])
def test_a_card_multiplies_in_tf32_as_long_as_the_block_lasts(device: str, inside: str) -> None:
    with pytest.raises(KeyError), matmul.tf32(torch.device(device)):
        assert torch.get_float32_matmul_precision() == inside
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_autoencoder_multiplies_in_tf32_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 it is for its range; its convolutions are in TF32 there by default. Here the CPU is taken for one."""
    as_on_a_card = matmul.tf32
    monkeypatch.setattr(latent_diffusion, "tf32", lambda _: as_on_a_card(torch.device("cuda")))
    model = built_in()
    seen: list[str] = []
    for layer in model.vae.modules():
        layer.register_forward_pre_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    latents = model.encode_pixels(normal(1, 3, 64, 64).clamp(-1, 1))
    encoded = len(seen)
    model.decode_latents(latents)
    assert 0 < encoded < len(seen) and set(seen) == {"high"}
    assert torch.get_float32_matmul_precision() == "highest"
