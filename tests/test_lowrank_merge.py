"""A merged model computes what the low-rank one does, and is the user's own dense model again."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from inrank_dist.lowrank.convert import LayerLayout, convert, find_targets
from inrank_dist.lowrank.kinds import linearise
from inrank_dist.lowrank.layer import LowRankLayer, set_activation, set_base_scale
from inrank_dist.lowrank.merge import merge


def low_rank(dense: nn.Module, targets: list[str], *, base: bool = False, modes: int = 3) -> nn.Module:
    """A real low-rank model, with normal factors of a size that the output feels."""
    names = find_targets(dense, targets)
    skeleton = copy.deepcopy(dense)
    linearise(skeleton, names)
    model = convert(skeleton, dict.fromkeys(names, LayerLayout(modes, modes, base)))
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, LowRankLayer):
            module.to_empty(device="cpu")
            for parameter in module.parameters():
                with torch.no_grad():
                    parameter.normal_(std=0.3, generator=generator)
    set_base_scale(model, 0.25)
    return model


def on_meta(model: nn.Module) -> nn.Module:
    """Its skeleton, ties kept."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    memo = {
        key: nn.Parameter(t.detach().to("meta"), requires_grad=t.requires_grad)
        if isinstance(t, nn.Parameter)
        else t.to("meta")
        for key, t in tensors.items()
    }
    return copy.deepcopy(model, memo)


class Own(nn.Module):
    """A tied head, a module used twice, frozen and computed parts, a convolution, buffers of all sorts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.blocks = nn.ModuleList(
            [
                nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)), "norm": self.norm})
                for _ in range(2)
            ]
        )
        self.mix = nn.Conv2d(1, 4, 3, padding=1)
        self.batch_norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.blocks[0]["norm"].bias.requires_grad_(False)
        self.register_buffer("scale", torch.full((8,), 0.7), persistent=False)
        self.shift = torch.arange(8.0)
        self.same_shift = self.shift

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) * self.scale + self.shift * 0.1
        for block in self.blocks:
            x = x + block["mlp"](block["norm"](x))
        return self.head(self.batch_norm(self.mix(x[:, None])).mean(1))


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("meta", [False, True])
def test_own_model(base: bool, meta: bool) -> None:
    torch.manual_seed(0)
    own = Own()
    model = low_rank(own, ["mlp", "mix"], base=base)
    model.scale.mul_(2)  # differs from the skeleton's
    model.shift.add_(1)
    model.batch_norm.running_mean.add_(0.3)
    model.eval()
    skeleton = on_meta(own) if meta else own
    before = {name: (id(p), p.device) for name, p in skeleton.named_parameters()}
    dense = merge(model, skeleton)
    x = torch.randint(0, 11, (2, 5))
    torch.testing.assert_close(dense(x), model(x), rtol=0, atol=1e-5)
    assert [(n, type(m), m.training) for n, m in dense.named_modules()] == [
        (n, type(m), False) for n, m in own.named_modules()
    ]
    assert dense.state_dict().keys() == own.state_dict().keys()
    assert dense.head.weight is dense.embed.weight
    assert dense.blocks[0]["norm"] is dense.blocks[1]["norm"] is dense.norm
    assert dense.same_shift is dense.shift
    taken = {name: p.requires_grad for name, p in dense.named_parameters()}
    assert taken == {name: p.requires_grad for name, p in own.named_parameters()}
    assert not taken["norm.bias"]
    # A copy: training either one leaves the other as it is. The skeleton serves again.
    held = {t.data_ptr() for m in (model, own) for t in (*m.parameters(), *m.buffers(), m.shift)}
    assert held.isdisjoint(t.data_ptr() for t in (*dense.parameters(), *dense.buffers(), dense.shift))
    assert {name: (id(p), p.device) for name, p in skeleton.named_parameters()} == before


def test_it_is_rounded_once() -> None:
    layer = nn.Sequential(nn.Linear(40, 30, dtype=torch.bfloat16))
    model = low_rank(layer, ["0"], base=True, modes=20)
    factors = model[0]
    exact = factors.U.double() @ factors.V.double().T + 0.25 * factors.base.double()
    merged = merge(model, layer)[0].weight
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, exact.bfloat16())
    assert not torch.equal(merged, factors.weight())  # in bfloat16 throughout


def test_ties_of_the_model_and_of_the_skeleton_are_kept() -> None:
    own = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    skeleton = on_meta(own)
    skeleton[1].weight = skeleton[0].weight
    own[1].weight = nn.Parameter(own[0].weight.detach().clone())  # equal, but two tensors: to_empty unties
    own[2].bias = own[0].bias
    dense = merge(own, skeleton)
    assert dense[1].weight is dense[0].weight
    assert dense[2].bias is dense[0].bias
    with torch.no_grad():
        own[1].weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"0\.weight and 1\.weight are tied in the skeleton but differ"):
        merge(own, skeleton)


def _activation(model: nn.Module) -> None:
    set_activation(model, "silu")


def _missing(model: nn.Module) -> None:
    del model.batch_norm


def _no_attribute(model: nn.Module) -> None:
    model.shift = None


def _surplus(model: nn.Module) -> None:
    model.extra = nn.Linear(2, 2)


def _surplus_bias(model: nn.Module) -> None:
    model.head.bias = nn.Parameter(torch.zeros(11))


def _on_meta(model: nn.Module) -> None:
    model.blocks[1]["mlp"].to("meta")


def _partition(model: nn.Module) -> None:
    model.blocks[1]["mlp"][0].U.data = torch.empty(0)


def _subclass(model: nn.Module) -> None:
    class Sharded(Tensor):
        pass

    model.scale = model.scale.as_subclass(Sharded)


def _other_size(model: nn.Module) -> None:
    model.norm.weight = nn.Parameter(torch.ones(9))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_activation, r"blocks\.0\.mlp\.0 cannot be merged: a layer with silu between"),
        (_missing, r"the model has no batch_norm, which"),
        (_no_attribute, r"the model has no tensor shift"),
        (_surplus, r"the skeleton has no extra\.weight"),
        (_surplus_bias, r"the skeleton has no head\.bias"),
        (_on_meta, r"blocks\.1\.mlp\.0\.U is on meta"),
        (_partition, r"blocks\.1\.mlp\.0\.U is \(0,\) in the model, where \(12, 3\) is expected"),
        (_subclass, r"scale is a Sharded; gather it"),
        (_other_size, r"norm\.weight is \(9,\) in the model, where \(8,\) is expected"),
    ],
)
def test_what_cannot_be_merged_is_named(damage: object, message: str) -> None:
    own = Own()
    model = low_rank(own, ["mlp", "mix"])
    damage(model)
    with pytest.raises(ValueError, match=message):
        merge(model, own)


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=12, n_layer=3, n_head=2))


def _llama(name: str, **settings: object) -> nn.Module:
    import transformers

    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}
    config = getattr(transformers, f"{name}Config")(**sizes, **heads, **settings)
    return getattr(transformers, f"{name}ForCausalLM")(config)


HUGGING_FACE = {
    "gpt2": (_gpt2, ("c_fc", "c_proj"), ("c_attn", "c_proj"), True),
    "llama": (
        lambda: _llama("Llama"),
        ("gate_proj", "up_proj", "down_proj"),
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        False,
    ),
    "qwen3": (
        lambda: _llama("Qwen3", tie_word_embeddings=True, head_dim=8),
        ("gate_proj", "up_proj", "down_proj"),
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        True,
    ),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_transformers(name: str) -> None:
    pytest.importorskip("transformers")
    build, mlp, attention, tied = HUGGING_FACE[name]
    torch.manual_seed(0)
    own = build().eval()
    counts = {target: len(find_targets(own, [target])) for target in ("mlp", "attention", "all", "inner")}
    both = len(mlp) + len(attention)
    assert counts == {"mlp": 3 * len(mlp), "attention": 3 * len(attention), "all": 3 * both, "inner": 2 * both}
    assert {n.rpartition(".")[2] for n in find_targets(own, ["mlp"])} == set(mlp)
    assert {n.rpartition(".")[2] for n in find_targets(own, ["attention"])} == set(attention)

    x = torch.randint(0, 40, (2, 7))
    model = low_rank(own, ["all"], base=True)
    with torch.no_grad():
        logits = model(input_ids=x).logits
        dense = merge(model, on_meta(own))
        assert (dense(input_ids=x).logits - logits).abs().max() < 1e-5
        assert (own(input_ids=x).logits - logits).abs().max() > 1e-2  # another function than at the start
    assert [(n, type(m)) for n, m in dense.named_modules()] == [(n, type(m)) for n, m in own.named_modules()]
    assert {n: p.shape for n, p in dense.state_dict().items()} == {n: p.shape for n, p in own.state_dict().items()}
    assert (dense.lm_head.weight is dense.get_input_embeddings().weight) == tied
    with pytest.raises(ValueError, match="is tied to the embedding") if tied else nullcontext():
        find_targets(own, ["lm_head"])


def test_a_linearised_gpt2_is_the_same_function_and_merges_either_way() -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    own = _gpt2().eval()
    x = torch.randint(0, 40, (2, 7))
    linear = copy.deepcopy(own)
    names = find_targets(own, ["mlp"])
    linearise(linear, names)
    assert {type(linear.get_submodule(name)) for name in names} == {nn.Linear}
    assert type(linear.transformer.h[0].attn.c_attn) is type(own.transformer.h[0].attn.c_attn)
    with torch.no_grad():
        logits = own(input_ids=x).logits
        torch.testing.assert_close(linear(input_ids=x).logits, logits, rtol=0, atol=1e-6)
        # Nothing is factored yet (a dense start): the weights are turned back all the same, square ones too.
        back = merge(linear, on_meta(own))
        assert all(torch.equal(value, own.state_dict()[name]) for name, value in back.state_dict().items())
        model = low_rank(own, ["mlp"])
        torch.testing.assert_close(
            merge(model, linear)(input_ids=x).logits, model(input_ids=x).logits, rtol=0, atol=1e-5
        )


def test_a_conv1d_is_not_converted_unless_linearised() -> None:
    pytest.importorskip("transformers")
    own = _gpt2()
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.mlp\.c_fc is a Conv1D, .*call linearise first"):
        convert(own, {"transformer.h.0.mlp.c_fc": LayerLayout(2, 2, False)})
