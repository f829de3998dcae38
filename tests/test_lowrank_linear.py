"""The layer is a dense layer with weight ``a * W0 + U @ V.T``, for values and for gradients."""

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inrank_dist.lowrank.layer import set_activation, set_base_scale
from inrank_dist.lowrank.linear import LowRankLinear


def filled(*, bias: bool = True, base: bool = True, modes: int = 3) -> LowRankLinear:
    """A float64 layer, 7 to 5, with normal values in everything."""
    layer = LowRankLinear(7, 5, modes, bias=bias, base=base, dtype=torch.float64)
    with torch.no_grad():
        for index, parameter in enumerate(layer.parameters()):
            parameter.copy_(reference.normal(1, parameter.numel(), index).view_as(parameter))
    return layer


def dense_weight(layer: LowRankLinear, scale: float) -> Tensor:
    weight = reference.product(layer.U, layer.V)
    return weight if layer.base is None else weight + scale * layer.base.detach()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 7), (0, 7)])
def test_forward_is_that_of_the_dense_weight(bias: bool, base: bool, shape: tuple[int, ...]) -> None:
    layer = filled(bias=bias, base=base)
    x = reference.normal(1, torch.Size(shape).numel(), 9).double().view(shape)
    for scale in (1.0, 0.25, 0.0):
        set_base_scale(layer, scale)
        expected = F.linear(x, dense_weight(layer, scale), layer.bias)
        assert torch.allclose(layer(x), expected, rtol=0, atol=1e-12)


def test_gradients_are_those_of_the_dense_weight_and_the_base_takes_none() -> None:
    layer, x, target = filled(), reference.normal(6, 7, 8).double(), reference.normal(6, 5, 9).double()
    set_base_scale(layer, 0.3)
    (layer(x) - target).square().sum().backward()

    def loss(product: Tensor) -> Tensor:
        return (F.linear(x, product + 0.3 * layer.base.detach(), layer.bias.detach()) - target).square().sum()

    expected_U, expected_V = reference.gradients(layer.U, layer.V, loss)
    assert torch.allclose(layer.U.grad, expected_U, atol=1e-11)
    assert torch.allclose(layer.V.grad, expected_V, atol=1e-11)
    assert torch.allclose(layer.bias.grad, 2 * (layer(x) - target).sum(0), atol=1e-11)
    assert layer.base.grad is None
    assert not layer.base.requires_grad
    assert not layer.base_scale.requires_grad


def test_gradient_reaches_the_input_through_both_parts() -> None:
    layer = filled()
    x = reference.normal(2, 7, 8).double().requires_grad_()
    set_base_scale(layer, 0.5)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, dense_weight(layer, 0.5).sum(0).expand(2, 7), atol=1e-12)


def test_factors_have_their_long_dimension_first() -> None:
    # Sharding cuts the first dimension; the rank must never be cut.
    layer = LowRankLinear(7, 5, 3)
    assert layer.U.shape == (5, 3)
    assert layer.V.shape == (7, 3)
    assert layer.bias.shape == (5,)
    assert layer.base is None
    assert LowRankLinear(7, 5, 3, base=True).base.shape == (5, 7)
    assert LowRankLinear(7, 5, 3, bias=False).bias is None


def test_base_scale_is_set_everywhere_in_place_and_nowhere_else() -> None:
    # In place: a compiled graph or a sharding engine holds the very tensor.
    model = nn.Sequential(filled(), nn.Linear(5, 7), nn.Sequential(filled(base=False)), filled())
    before = [model[0].base_scale, model[3].base_scale]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    set_base_scale(model, 0.125)
    assert model[0].base_scale is before[0]
    assert model[3].base_scale is before[1]
    assert [float(scale) for scale in before] == [0.125, 0.125]
    assert model[2][0].base_scale is None
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_base_scale_starts_at_one_and_is_not_saved() -> None:
    # It follows from the step number; a saved copy could contradict it.
    layer = LowRankLinear(7, 5, 3, base=True)
    assert float(layer.base_scale) == 1
    assert set(layer.state_dict()) == {"U", "V", "bias", "base"}
    assert set(LowRankLinear(7, 5, 3, bias=False).state_dict()) == {"U", "V"}


def test_builds_on_meta_without_memory() -> None:
    # Reshaping rebuilds the model; a dense base of a large layer must not be allocated on the way.
    layer = LowRankLinear(10**6, 10**6, 64, base=True, device="meta", dtype=torch.bfloat16)
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in layer.parameters())
    assert layer.base_scale.is_meta
    assert layer(torch.empty(2, 10**6, device="meta", dtype=torch.bfloat16)).shape == (2, 10**6)


def test_keeps_the_compute_dtype() -> None:
    # The scale is float32 whatever the weights are; it must not drag a bfloat16 activation up.
    layer = filled().to(torch.bfloat16)
    layer.base_scale = torch.ones(())
    assert layer(torch.ones(2, 7, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_an_activation_lies_between_the_factors() -> None:
    x = reference.normal(3, 7, 8).double()
    layer = filled(base=False)
    plain = layer(x)
    set_activation(nn.Sequential(layer), "silu")
    torch.testing.assert_close(layer(x), F.silu(x @ layer.V) @ layer.U.T + layer.bias)
    (joined,) = LowRankLinear.forward_fused([layer], x)
    torch.testing.assert_close(joined, layer(x))
    assert not torch.allclose(plain, joined)
