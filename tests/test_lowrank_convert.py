"""Finding the layers that are to be factored, and making them low-rank inside any module."""

import copy

import pytest
import torch
from torch import nn

from inrank_dist.lowrank.convert import LayerLayout, convert, find_targets
from inrank_dist.lowrank.linear import LowRankLinear
from inrank_dist.models import ModelSettings, build_model


class Block(nn.Module):
    """A stranger's block, with names as they are in the wild."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(8, 8, bias=False), "o_proj": nn.Linear(8, 8, bias=False)})
        self.mlp = nn.ModuleDict({"up": nn.Linear(8, 16), "act": nn.GELU(), "down": nn.Linear(16, 8)})
        self.mlp_norm = nn.LayerNorm(8)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.mlp_head = nn.Linear(8, 11)


@pytest.fixture
def skeleton() -> Model:
    with torch.device("meta"):
        return Model()


MLP = [f"blocks.{i}.mlp.{leaf}" for i in (0, 1) for leaf in ("up", "down")]
ATTENTION = [f"blocks.{i}.self_attn.{leaf}" for i in (0, 1) for leaf in ("q_proj", "o_proj")]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["mlp"], MLP),
        (["attention"], ATTENTION),
        (["all"], ATTENTION[:2] + MLP[:2] + ATTENTION[2:] + MLP[2:]),
        (["inner"], ATTENTION[2:] + MLP[2:]),
        (["attention", "mlp"], ATTENTION[:2] + MLP[:2] + ATTENTION[2:] + MLP[2:]),
        ([r"blocks\.1\..*down$"], ["blocks.1.mlp.down"]),
        ([r"up$", r"q_proj$"], ["blocks.0.self_attn.q_proj", MLP[0], "blocks.1.self_attn.q_proj", MLP[2]]),
        (["mlp", r"down$"], MLP),
        (["head"], ["mlp_head"]),
    ],
)
def test_targets_are_found_once_each_in_the_models_order(
    skeleton: Model, targets: list[str], expected: list[str]
) -> None:
    # The order decides how Grams are packed into one message: it must not follow the order of the targets. A norm, a
    # module that is merely called mlp-something, and the activation inside the mlp are not meant.
    found = find_targets(skeleton, targets)
    assert list(found) == expected
    assert all(skeleton.get_submodule(name) is layer for name, layer in found.items())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_targets_of_our_own_models(name: str) -> None:
    with torch.device("meta"):
        model = build_model(ModelSettings(name=name, num_layers=2, num_heads=2, hidden_size=16, max_seq_len=8), 32)
    counts = {target: len(find_targets(model, [target])) for target in ("mlp", "attention", "all", "inner")}
    mlp = {"gpt2": 4, "llama": 6}[name]
    assert counts == {"mlp": mlp, "attention": 8, "all": mlp + 8, "inner": mlp // 2 + 4}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["mpl"], "'mpl' matches no linear layer; the layers are named like 'blocks.0.self_attn.q_proj'"),
        (["mlp", "norm"], "'norm' matches no linear layer"),
        (["("], "'(' is not a regular expression"),
    ],
)
def test_wrong_targets_are_told(skeleton: Model, targets: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        find_targets(skeleton, targets)
    assert message in str(caught.value)


def test_a_model_without_linear_layers_is_told() -> None:
    with pytest.raises(ValueError, match="no linear layer"):
        find_targets(nn.Sequential(nn.LayerNorm(3)), ["all"])


def test_convert_replaces_the_named_layers_only(skeleton: Model) -> None:
    layout = {MLP[0]: LayerLayout(rank=2, modes=5, base=True), ATTENTION[3]: LayerLayout(rank=3, modes=3, base=False)}
    before = {name: (p.shape, p.dtype) for name, p in skeleton.named_parameters()}
    model = convert(skeleton, layout)
    up, out = model.get_submodule(MLP[0]), model.get_submodule(ATTENTION[3])
    assert isinstance(up, LowRankLinear)
    assert (up.out_features, up.in_features, up.modes) == (16, 8, 5)
    assert up.U.shape == (16, 5)
    assert up.V.shape == (8, 5)
    assert up.base.shape == (16, 8)
    assert up.bias.shape == (16,)
    assert isinstance(out, LowRankLinear)
    assert out.base is None
    assert out.bias is None
    assert all(parameter.is_meta for parameter in model.parameters())
    changed = {name for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    assert changed == set(layout)
    # The skeleton serves every later event: it must stay dense.
    assert {name: (p.shape, p.dtype) for name, p in skeleton.named_parameters()} == before
    assert type(skeleton.get_submodule(MLP[0])) is nn.Linear


def test_converting_again_gives_other_ranks(skeleton: Model) -> None:
    for modes in (2, 7, 4):
        assert convert(skeleton, {MLP[0]: LayerLayout(1, modes, False)}).get_submodule(MLP[0]).modes == modes


def test_convert_reaches_a_layer_at_the_root(skeleton: Model) -> None:
    assert isinstance(convert(skeleton, {"mlp_head": LayerLayout(2, 2, False)}).mlp_head, LowRankLinear)


def test_convert_keeps_the_dtype() -> None:
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.float64, device="meta"))
    converted = convert(model, {"0": LayerLayout(1, 2, True)})
    assert {parameter.dtype for parameter in converted.parameters()} == {torch.float64}


def test_convert_keeps_tied_weights_tied() -> None:
    with torch.device("meta"):
        settings = ModelSettings(name="gpt2", num_layers=1, num_heads=2, hidden_size=16, max_seq_len=8)
        model = build_model(settings, 32)
    converted = convert(model, {name: LayerLayout(2, 2, False) for name in find_targets(model, ["mlp"])})
    assert converted.head.weight is converted.tok_embed.weight


def test_convert_of_an_empty_layout_is_a_copy(skeleton: Model) -> None:
    model = convert(skeleton, {})
    assert model is not skeleton
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in skeleton.named_parameters()]


def test_convert_refuses_what_is_no_linear_layer(skeleton: Model) -> None:
    with pytest.raises(TypeError, match=r"blocks\.0\.mlp_norm is a LayerNorm, not a linear layer"):
        convert(skeleton, {"blocks.0.mlp_norm": LayerLayout(1, 1, False)})


def test_a_converted_model_computes_what_the_dense_one_does() -> None:
    # With U V^T equal to the dense weights, in real memory: the layers sit where the old ones sat.
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 4)).double()
    model = convert(copy.deepcopy(dense).to("meta"), {"0": LayerLayout(6, 6, False), "2": LayerLayout(4, 4, True)})
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for name in ("0", "2"):
            weight, layer = dense.get_submodule(name).weight, model.get_submodule(name)
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            layer.U.copy_(u * s)
            layer.V.copy_(vh.T)
            layer.bias.copy_(dense.get_submodule(name).bias)
        model[2].base.copy_(dense[2].weight)
        model[2].base_scale.fill_(0.5)
        model[2].U.mul_(0.5)
    x = torch.randn(3, 6, dtype=torch.float64)
    assert torch.allclose(model(x), dense(x), atol=1e-12)
