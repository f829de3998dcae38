"""Layer kinds: each low-rank layer is the dense one with the merged weight, and what has no such weight is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from inrank_dist.lowrank import kinds
from inrank_dist.lowrank.conv import LowRankConv2d
from inrank_dist.lowrank.convert import LayerLayout, convert, find_targets
from inrank_dist.lowrank.kinds import kind_of, matrix_shape, register_layer_kind
from inrank_dist.lowrank.layer import LayerKind, LowRankLayer, set_activation, set_base_scale
from inrank_dist.lowrank.linear import LowRankLinear
from inrank_dist.lowrank.merge import merge


def converted(dense: nn.Module, modes: int, *, base: bool = False) -> LowRankLayer:
    """The layer that stands for a dense one, with normal values in everything."""
    model = convert(nn.Sequential(copy.deepcopy(dense)).to("meta"), {"0": LayerLayout(modes, modes, base)})
    layer = model[0].to_empty(device="cpu")
    assert isinstance(layer, LowRankLayer)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    set_base_scale(model, 0.3)
    return layer


GEOMETRIES = {
    "plain": {"kernel_size": 3},
    "1 x 1": {"kernel_size": 1, "bias": False},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "strides": {"kernel_size": (3, 2), "stride": (1, 3), "padding": (2, 0)},
    "dilation": {"kernel_size": (2, 3), "dilation": (3, 2), "padding": (1, 2)},
    "same": {"kernel_size": (3, 5), "padding": "same"},
    "same, even": {"kernel_size": (4, 2), "padding": "same", "dilation": 2},
    "valid": {"kernel_size": 3, "padding": "valid", "padding_mode": "circular"},
    "reflect": {"kernel_size": (5, 3), "padding": (2, 1), "padding_mode": "reflect", "stride": 2},
    "circular, same, even": {"kernel_size": (2, 4), "padding": "same", "padding_mode": "circular"},
    "replicate": {"kernel_size": 3, "padding": (0, 2), "padding_mode": "replicate", "bias": False},
}


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_low_rank_convolution_is_the_dense_one_with_the_merged_weight(geometry: str, base: bool) -> None:
    torch.manual_seed(0)
    dense = nn.Conv2d(3, 5, **GEOMETRIES[geometry], dtype=torch.float64)
    layer = converted(dense, 2, base=base)
    assert isinstance(layer, LowRankConv2d)
    assert layer.shape == matrix_shape(dense)
    x = torch.randn(2, 3, 9, 10, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(dense(x).shape, dtype=torch.float64)

    # The reference: torch's own module, with a weight written out from the factors. The scale is a float32.
    leaves = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    matrix = leaves["U"] @ leaves["V"].T
    if base:
        matrix = matrix + float(torch.tensor(0.3)) * leaves.pop("base").detach()
    weights = {"weight": matrix.view(dense.weight.shape)} | {n: p for n, p in leaves.items() if n == "bias"}
    expected = torch.func.functional_call(dense, weights, (x,))
    wanted = torch.autograd.grad((expected * direction).sum(), [x, *leaves.values()])

    y = layer(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-11)
    got = torch.autograd.grad((y * direction).sum(), [x, *(getattr(layer, name) for name in leaves)])
    for ours, reference in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-10)
    torch.testing.assert_close(layer(x[0]), expected[0], rtol=0, atol=1e-11)  # without a batch

    merged = merge(nn.Sequential(layer), nn.Sequential(dense))[0]
    assert type(merged) is nn.Conv2d
    torch.testing.assert_close(merged(x), expected, rtol=0, atol=1e-11)


def test_a_convolutions_factors_have_their_long_dimension_first() -> None:
    layer = converted(nn.Conv2d(3, 5, (2, 4)), 7, base=True)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "U": (5, 7),
        "V": (24, 7),
        "bias": (5,),
        "base": (5, 24),
    }
    assert not layer.base.requires_grad
    assert "3, 5, kernel_size=(2, 4)" in repr(layer)


@pytest.mark.parametrize("dense", [nn.Linear(6, 4), nn.Conv2d(2, 4, (3, 1))], ids=["linear", "conv2d"])
def test_a_kinds_matrix_is_the_weight_row_by_row(dense: nn.Module) -> None:
    kind = kind_of(dense)
    matrix = kind.matrix(dense.weight)
    assert tuple(matrix.shape) == kind.shape(dense)
    assert matrix.data_ptr() == dense.weight.data_ptr()
    assert torch.equal(kind.restore(dense, matrix), dense.weight)
    # A process's rows of the weight are the same rows of the matrix.
    rows = kind.matrix(dense.weight[1:3])
    assert torch.equal(rows, matrix[1:3])
    assert torch.equal(kind.restore(dense, rows), dense.weight[1:3])


@pytest.mark.parametrize("base", [False, True])
def test_the_weight_is_what_the_layer_applies(base: bool) -> None:
    layer = converted(nn.Linear(6, 4, dtype=torch.float64), 3, base=base)
    x = torch.randn(2, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight(), layer.bias), rtol=0, atol=1e-12)
    assert layer.weight(torch.float32).dtype == torch.float32
    set_activation(nn.Sequential(layer), "silu")
    with pytest.raises(ValueError, match="silu between its factors is no matrix"):
        layer.weight()


def test_settings_reach_layers_of_every_kind() -> None:
    layer = converted(nn.Conv2d(3, 5, 3), 4, base=True)
    x = torch.randn(1, 3, 6, 6)
    plain, scale = layer(x), layer.base_scale
    set_activation(nn.Sequential(layer), "silu")
    expected = F.conv2d(F.silu(layer.read(x)), layer.U[:, :, None, None], layer.bias) + 0.3 * layer.through_base(x)
    torch.testing.assert_close(layer(x), expected)
    assert not torch.allclose(layer(x), plain)
    set_base_scale(nn.Sequential(layer), 0.5)
    assert layer.base_scale is scale
    assert float(scale) == 0.5


def test_convert_keeps_what_the_dense_layer_says() -> None:
    dense = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False, dtype=torch.bfloat16), nn.Linear(4, 4)).to("meta").eval()
    dense[1].bias.requires_grad_(False)
    model = convert(dense, {name: LayerLayout(2, 2, False) for name in ("0", "1")})
    assert {p.dtype for p in model[0].parameters()} == {torch.bfloat16}
    assert model[0].bias is None
    assert not model[0].training
    assert [name for name, p in model[1].named_parameters() if p.requires_grad] == ["U", "V"]


class Scaled(nn.Module):
    """Somebody's own dense layer: ``y = gain * x @ weight.T``."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.randn(size, size)), 3.0

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * F.linear(x, self.weight)


class LowRankScaled(LowRankLinear):
    def forward(self, x: Tensor) -> Tensor:
        return 3.0 * super().forward(x)


class ScaledKind(LayerKind[Scaled]):
    dense = Scaled

    def shape(self, module: Scaled) -> tuple[int, int]:
        return module.weight.shape[0], module.weight.shape[1]

    def make(self, module: Scaled, modes: int, base: bool) -> LowRankLinear:
        return LowRankScaled(
            *self.shape(module), modes, bias=False, base=base, device="meta", dtype=module.weight.dtype
        )


def test_a_kind_from_outside_is_found_converted_and_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "KINDS", dict(kinds.KINDS))
    own = nn.ModuleDict({"mlp": nn.Sequential(Scaled(4))})
    with pytest.raises(ValueError, match="no linear layer"):
        find_targets(own, ["mlp"])
    register_layer_kind(ScaledKind())
    assert list(find_targets(own, ["mlp"])) == ["mlp.0"]
    layer = converted(own["mlp"][0], 2, base=True)
    x = torch.randn(3, 4)
    model = nn.ModuleDict({"mlp": nn.Sequential(layer)})
    torch.testing.assert_close(merge(model, own)["mlp"][0](x), layer(x))
    with pytest.raises(ValueError, match="has a layer kind already, ScaledKind"):
        register_layer_kind(ScaledKind())


class Plain(nn.Linear):
    pass


class Clamped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-1, 1)


def test_a_subclass_is_of_its_base_class_kind_and_its_own_kind_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "KINDS", dict(kinds.KINDS))
    assert kind_of(Plain(2, 2)) is kind_of(nn.Linear(2, 2))
    assert kind_of(Plain(2, 2)).refusal(Plain(2, 2)) is None
    assert kind_of(nn.LayerNorm(2)) is None
    with pytest.raises(TypeError, match="a LayerNorm has no layer kind"):
        matrix_shape(nn.LayerNorm(2))

    class PlainKind(kinds.LinearKind):
        dense = Plain

    register_layer_kind(PlainKind())
    assert isinstance(kind_of(Plain(2, 2)), PlainKind)
    assert kind_of(Plain(2, 2)).refusal(Plain(2, 2)) is None


def _hooked() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda module, inputs, output: output * 2)
    return layer


def _patched() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x
    return layer


def _parametrised() -> nn.Module:
    return parametrize.register_parametrization(nn.Linear(4, 4), "weight", nn.Tanh())


REFUSED = {
    "groups": (lambda: nn.Conv2d(4, 4, 3, groups=2), "is a convolution with 2 groups"),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), "is a convolution with 4 groups"),
    "own forward": (lambda: Clamped(4, 4), "is a Clamped with a forward of its own"),
    "patched": (_patched, "is a Linear with a forward of its own"),
    "hooked": (_hooked, "has hooks"),
    "parametrised": (_parametrised, "has a weight that is computed from other parameters"),
    "frozen": (lambda: nn.Linear(4, 4).requires_grad_(False), "has a frozen weight"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_factored_is_refused_by_name(case: str) -> None:
    make, reason = REFUSED[case]
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": make()})
    with pytest.raises(ValueError, match=f"^b {reason}.*so it cannot be factored; write targets that leave it out"):
        find_targets(model, [r"^[ab]$"])
    assert list(find_targets(model, ["^a$"])) == ["a"]
    with pytest.raises(ValueError, match=f"^b {reason}"):
        convert(model, {"b": LayerLayout(1, 1, False)})


def test_the_projection_of_a_multihead_attention_is_refused() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2)})
    with pytest.raises(ValueError, match=r"attn\.out_proj belongs to an nn\.MultiheadAttention"):
        find_targets(model, ["attention"])


def test_shared_and_tied_layers_are_refused_by_name() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": shared, "second": shared, "free": nn.Linear(4, 4)})
    for target, other in (("first", "second"), ("second", "first")):
        with pytest.raises(ValueError, match=f"^{target} is the same layer as {other}"):
            find_targets(model, [target])
    assert list(find_targets(model, ["free"])) == ["free"]

    model = nn.ModuleDict(
        {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "embed": nn.Embedding(4, 4), "c": nn.Linear(4, 4)}
    )
    model["b"].bias = model["a"].bias
    model["c"].weight = model["embed"].weight
    with pytest.raises(ValueError, match=r"^a has a bias that is tied to b\.bias"):
        find_targets(model, ["^a$"])
    with pytest.raises(ValueError, match=r"^c has a weight that is tied to the embedding embed, so"):
        find_targets(model, ["^c$"])


@pytest.mark.parametrize(
    ("name", "inner"),
    [
        ("h.0.mlp.c_fc", False),
        ("transformer.h.0.attn.c_attn", False),
        ("h.10.mlp.c_fc", True),
        ("model.layers.1.self_attn.q_proj", True),
        ("layers.0.mlp.experts.3.mlp.up", False),  # an expert's index is none of a block
        ("layers.1.mlp.0", True),
        ("stages.0.blocks.0.attn.qkv", False),
        ("stages.0.blocks.1.attn.qkv", True),
        ("stages.1.blocks.0.attn.qkv", True),
        ("mlp.1.up", False),
    ],
)
def test_inner_leaves_out_the_first_block_and_nothing_else(name: str, inner: bool) -> None:
    model = nn.Module()
    for path in (name, "blocks.1.mlp.up"):
        module = model
        *parents, leaf = path.split(".")
        for part in parents:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.add_module(leaf, nn.Linear(2, 2))
    assert (name in find_targets(model, ["inner"])) == inner
    assert name in find_targets(model, ["all"])
