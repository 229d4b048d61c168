"""The norm of a change is that of dW, and what is above a limit is scaled to it by equal shares of its factors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdtrain.adapters.kinds import AdapterWeights, DoraWeights, LohaWeights, LokrWeights, LoraWeights, delta, mapped
from sdtrain.adapters.norms import change_norm, shares_within

GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


KINDS: dict[str, tuple[AdapterWeights, int, tuple[int, ...]]] = {
    "lora": (LoraWeights(normal(4, 10), normal(6, 4), 2.0), 2, (6, 10)),
    "lora on a convolution": (LoraWeights(normal(4, 5, 3, 3), normal(6, 4, 1, 1), 8.0), 2, (6, 5, 3, 3)),
    "loha": (LohaWeights(normal(6, 4), normal(4, 10), normal(6, 4), normal(4, 10), 2.0), 4, (6, 10)),
    "lokr": (LokrWeights(normal(2, 5), (normal(3, 4), normal(4, 2)), 2.0), 3, (6, 10)),
    "lokr, whole": (LokrWeights(normal(2, 5), normal(3, 2), 2.0), 2, (6, 10)),
    "lokr, two products": (LokrWeights((normal(2, 3), normal(3, 5)), (normal(3, 3), normal(3, 2)), 2.0), 4, (6, 10)),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_norm_is_that_of_the_change_itself(name: str) -> None:
    weights, _, shape = KINDS[name]
    wanted = delta(weights, torch.zeros(shape)).double().norm()
    assert float(change_norm(weights)) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_a_change_above_the_limit_is_scaled_to_it_in_its_direction(name: str) -> None:
    weights, num_factors, shape = KINDS[name]
    before = delta(weights, torch.zeros(shape))
    limit = 0.3 * float(before.norm())
    (share,) = shares_within(change_norm(weights)[None], limit, [num_factors])
    after = delta(mapped(weights, lambda tensor: tensor * share), torch.zeros(shape))
    torch.testing.assert_close(after, 0.3 * before, rtol=1e-4, atol=1e-5)
    (again,) = shares_within(change_norm(mapped(weights, lambda tensor: tensor * share))[None], limit, [num_factors])
    assert again == 1, "what keeps the limit is not scaled again"


@given(norm=st.floats(1e-4, 1e4), limit=st.floats(1e-3, 1e3), num=st.integers(2, 4))
def test_shares_are_roots_of_the_ratio_and_one_below_the_limit(norm: float, limit: float, num: int) -> None:
    (share,) = shares_within(torch.tensor([norm]), limit, [num])
    if norm <= limit:
        assert share == 1
    elif norm > 1.0001 * limit:
        assert float(share) == pytest.approx((limit / norm) ** (1 / num), rel=1e-5)


def test_a_change_that_is_no_number_or_nothing_is_left_alone() -> None:
    assert [float(one) for one in shares_within(torch.tensor([float("nan"), 0.0]), 1.0, [2, 2])] == [1.0, 1.0]


def test_a_dora_has_no_such_factors() -> None:
    weights = DoraWeights(LoraWeights(normal(2, 4), normal(3, 2), 1.0), normal(3))
    with pytest.raises(TypeError, match="no product"):
        change_norm(weights)
