"""The dense models: equal to the published ones, right when built on meta, and fit to be run per block."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from inrank_dist.lowrank.materialize import materialize
from inrank_dist.models import (
    InitRule,
    LanguageModel,
    ModelSettings,
    build_model,
    flops_per_token,
    parameter_count,
)
from inrank_dist.runtime.errors import UserError

VOCAB = 1001  # odd on purpose: nothing may assume a padded vocabulary


def tiny(name: str = "gpt2", **changes: Any) -> ModelSettings:
    """A model of two blocks that runs in milliseconds."""
    values: dict[str, Any] = {"num_layers": 2, "num_heads": 4, "hidden_size": 32, "max_seq_len": 24}
    return ModelSettings(name=name, **(values | changes))  # type: ignore[arg-type]


def fill_by_rule(model: LanguageModel, seed: int = 0) -> LanguageModel:
    """Give every parameter its initial value."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        kind, std = model.init_std(name)
        with torch.no_grad():
            if kind == "normal":
                parameter.normal_(0.0, std, generator=generator)
            else:
                parameter.fill_(1.0 if kind == "ones" else 0.0)
    return model


def built(settings: ModelSettings, vocab_size: int = VOCAB) -> LanguageModel:
    """A filled model in evaluation mode."""
    return fill_by_rule(build_model(settings, vocab_size)).eval()


def on_meta(settings: ModelSettings, vocab_size: int = VOCAB) -> LanguageModel:
    """The same model without values."""
    with torch.device("meta"):
        return build_model(settings, vocab_size)


def token_ids(batch: int = 2, length: int = 24, seed: int = 1) -> Tensor:
    """Random token ids."""
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


BOTH = pytest.mark.parametrize(
    "settings",
    [
        tiny(),
        tiny(dropout=0.1, tie_embeddings=False),
        tiny("llama", num_kv_heads=2),
        tiny("llama", tie_embeddings=True),
    ],
    ids=["gpt2", "gpt2-untied", "llama-grouped", "llama-tied"],
)


# Equality with the published models -----------------------------------------------------------------------


def randomise(model: nn.Module) -> None:
    # transformers starts biases at zero and norms at one, where a forgotten or swapped one would not show.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)


def from_gpt2(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names and layouts of ours from those of GPT2LMHeadModel, whose linears are stored transposed."""
    ours = {
        "tok_embed.weight": theirs["transformer.wte.weight"],
        "pos_embed.weight": theirs["transformer.wpe.weight"],
        "head.weight": theirs["lm_head.weight"],
    }
    for part in ("weight", "bias"):
        ours[f"final_norm.{part}"] = theirs[f"transformer.ln_f.{part}"]
        for layer in range(2):
            old, new = f"transformer.h.{layer}", f"blocks.{layer}"
            ours[f"{new}.attention_norm.{part}"] = theirs[f"{old}.ln_1.{part}"]
            ours[f"{new}.mlp_norm.{part}"] = theirs[f"{old}.ln_2.{part}"]
            for name, value in zip("qkv", theirs[f"{old}.attn.c_attn.{part}"].chunk(3, dim=-1), strict=True):
                ours[f"{new}.attention.{name}.{part}"] = value.T if part == "weight" else value
            for name, source in (
                ("attention.out", "attn.c_proj"),
                ("mlp.up", "mlp.c_fc"),
                ("mlp.down", "mlp.c_proj"),
            ):
                value = theirs[f"{old}.{source}.{part}"]
                ours[f"{new}.{name}.{part}"] = value.T if part == "weight" else value
    return ours


def from_llama(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of ours from those of LlamaForCausalLM."""
    renames = {
        "model.layers.": "blocks.",
        "model.embed_tokens": "tok_embed",
        "model.norm": "final_norm",
        "lm_head": "head",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "mlp_norm",
        "self_attn.o_proj": "attention.out",
        "self_attn": "attention",
        "_proj": "",
    }
    ours = {}
    for name, value in theirs.items():
        for old, new in renames.items():
            name = name.replace(old, new)
        ours[name] = value
    return ours


def assert_same_logits(
    theirs: nn.Module, settings: ModelSettings, translate: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    randomise(theirs)
    ours = build_model(settings, VOCAB).eval()
    ours.load_state_dict(translate(theirs.state_dict()), strict=True)
    ids = token_ids()
    with torch.no_grad():
        expected = theirs.eval()(ids).logits
        actual = ours(ids)
    assert expected.abs().max() > 1
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_gpt2_gives_the_logits_of_transformers(tied: bool) -> None:
    """Exported models and published weights are only right if the architecture is exactly GPT-2's."""
    config = GPT2Config(vocab_size=VOCAB, n_positions=24, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=tied)
    assert_same_logits(GPT2LMHeadModel(config), tiny(dropout=0.1, tie_embeddings=tied), from_gpt2)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_llama_gives_the_logits_of_transformers(tied: bool, kv_heads: int) -> None:
    """The same for Llama; a non-default rotary base and epsilon show that both settings arrive."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        max_position_embeddings=24,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=tied,
    )
    settings = tiny(
        "llama",
        num_kv_heads=kv_heads,
        intermediate_size=80,
        rope_theta=500.0,
        norm_eps=1e-3,
        tie_embeddings=tied,
    )
    assert_same_logits(LlamaForCausalLM(config), settings, from_llama)


# Forward and loss -----------------------------------------------------------------------------------------


@BOTH
def test_loss_is_the_sum_over_counted_targets(settings: ModelSettings) -> None:
    """The loop divides by the global token count, so a mean here, or a counted -100, would be wrong."""
    model = built(settings)
    ids, targets = token_ids(), token_ids(seed=2)
    targets[0, :7] = -100
    logits = model(ids)
    assert logits.shape == (2, 24, VOCAB)
    loss = model(ids, targets)
    expected = F.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1), ignore_index=-100, reduction="sum")
    assert loss.shape == () and loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    # At these initial values a model knows nothing: every counted token costs about ln(vocabulary).
    assert loss.item() == pytest.approx((2 * 24 - 7) * math.log(VOCAB), rel=0.02)


@BOTH
def test_a_later_token_changes_no_earlier_logit(settings: ModelSettings) -> None:
    """A leak from the future makes training loss meaningless."""
    model = built(settings)
    ids = token_ids()
    changed = ids.clone()
    changed[:, 10] = (changed[:, 10] + 1) % VOCAB
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert torch.equal(before[:, :10], after[:, :10])
    assert ((before[:, 10:] - after[:, 10:]).abs().amax(-1) > 0).all()


@BOTH
def test_a_shorter_sequence_gives_the_same_prefix(settings: ModelSettings) -> None:
    """Generation feeds growing prefixes; positions must not depend on the length."""
    model = built(settings)
    with torch.no_grad():
        torch.testing.assert_close(model(token_ids()[:, :9]), model(token_ids())[:, :9])


@BOTH
def test_too_long_a_sequence_is_refused(settings: ModelSettings) -> None:
    """Without the check a learned position gives an index error deep inside, a rotary one a shape error."""
    with pytest.raises(ValueError, match=r"25 tokens is longer than model\.max_seq_len 24"):
        built(settings)(token_ids(length=25))


def test_dropout_acts_in_training_only() -> None:
    """Attention dropout is a number handed to a function, so nn.Module.eval() alone does not stop it."""
    model = built(tiny(dropout=0.5))
    ids = token_ids()
    assert torch.equal(model(ids), model(ids))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    assert not torch.equal(model(ids), model(ids))


@BOTH
@pytest.mark.parametrize("how", ["autocast", "cast"])
def test_bfloat16_gives_a_float32_loss_near_the_exact_one(settings: ModelSettings, how: str) -> None:
    """Engines reach bfloat16 by autocast or by casting the module; the loss is summed in float32 in both."""
    model = built(settings)
    ids, targets = token_ids(), token_ids(seed=2)
    exact = model(ids, targets)
    if how == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(ids).dtype == torch.bfloat16
            loss = model(ids, targets)
    else:
        loss = model.bfloat16()(ids, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=2e-3, atol=0)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_rotary_positions_survive_a_cast() -> None:
    """DeepSpeed casts whole modules to bfloat16, which keeps three digits of a cosine."""
    model = build_model(tiny("llama"), VOCAB)
    before = dict(model.named_buffers())
    after = dict(copy.deepcopy(model).bfloat16().named_buffers())
    assert before.keys() == after.keys() != set()
    for name, table in before.items():
        assert table.dtype == torch.float32 and torch.equal(table, after[name])


# Structure that others rely on ----------------------------------------------------------------------------


@BOTH
def test_meta_then_materialised_gives_the_model_built_directly(settings: ModelSettings) -> None:
    """Engines build on meta; an unset rotary table or a head no longer tied would train, only worse."""
    direct = built(settings)
    model = on_meta(settings)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model = copy.deepcopy(model)
    materialize(model, model.initial_values(0).buffer, torch.device("cpu"))
    fill_by_rule(model).eval()
    assert (model.head.weight is model.tok_embed.weight) == settings.tied
    assert model.state_dict().keys() == direct.state_dict().keys()
    assert torch.equal(model(token_ids()), direct(token_ids()))


@BOTH
def test_every_parameter_has_its_rule(settings: ModelSettings) -> None:
    """Engines ask by name on a meta model; a name missed or misjudged gives a model that starts wrong."""
    model = on_meta(settings)
    residual = 0.02 / math.sqrt(2 * settings.num_layers)
    for name, parameter in model.named_parameters():
        if name.endswith(("attention.out.weight", "mlp.down.weight")):
            assert model.init_std(name) == InitRule("normal", residual)
        elif parameter.dim() == 2:
            assert model.init_std(name) == InitRule("normal", 0.02)
        else:
            assert model.init_std(name) == InitRule("zeros" if name.endswith("bias") else "ones")
    assert sum("mlp.down.weight" in name for name, _ in model.named_parameters()) == settings.num_layers
    with pytest.raises(KeyError):
        model.init_std("blocks.0.mlp.up.U")


def test_projections_are_separate_linears_under_the_agreed_names() -> None:
    """Targets of the low-rank conversion are chosen by these names."""

    def linears(settings: ModelSettings) -> dict[str, tuple[int, ...]]:
        block = on_meta(settings).blocks[1]
        return {n: tuple(m.weight.shape) for n, m in block.named_modules() if isinstance(m, nn.Linear)}

    square = {f"attention.{name}": (32, 32) for name in ("q", "k", "v", "out")}
    assert linears(tiny()) == square | {"mlp.up": (128, 32), "mlp.down": (32, 128)}
    grouped = square | {"attention.k": (16, 32), "attention.v": (16, 32)}
    assert linears(tiny("llama", num_kv_heads=2, intermediate_size=80)) == grouped | {
        "mlp.gate": (80, 32),
        "mlp.up": (80, 32),
        "mlp.down": (32, 80),
    }


@BOTH
def test_blocks_compile_whole_and_once(settings: ModelSettings) -> None:
    """A graph break or one compilation for each block makes the first step of a deep model take minutes."""
    model = built(settings).train(settings.dropout == 0)
    expected = model(token_ids())
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(fullgraph=True, backend=count)
    torch.testing.assert_close(model(token_ids()), expected)
    assert graphs == 1


# Sizes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "heads", "hidden", "dense", "rank", "low_rank"),
    [
        (12, 12, 768, 124_439_808, 254, "91.2M"),
        (24, 16, 1024, 354_823_168, 287, "224.0M"),
        (36, 20, 1280, 774_030_080, 313, "446.4M"),
    ],
    ids=["small", "medium", "large"],
)
def test_published_parameter_counts(layers: int, heads: int, hidden: int, dense: int, rank: int, low_rank: str) -> None:
    """GPT-2's sizes, and InRank's (arXiv 2306.11250) when both MLP matrices become factors of its ranks."""
    settings = ModelSettings(num_layers=layers, num_heads=heads, hidden_size=hidden, max_seq_len=1024)
    assert parameter_count(settings, 50257) == dense
    total = 0
    for name, parameter in on_meta(settings, 50257).named_parameters():
        factored = name.endswith(("mlp.up.weight", "mlp.down.weight"))
        total += rank * sum(parameter.shape) if factored else parameter.numel()
    assert f"{total / 1e6:.1f}M" == low_rank


@pytest.mark.parametrize(
    ("hidden", "heads", "layers", "vocab", "changes", "published"),
    [
        (4096, 32, 32, 32000, {}, 6_738_415_616),  # Llama 2 7B
        (5120, 40, 40, 32000, {}, 13_015_864_320),  # Llama 2 13B
        (2048, 32, 22, 32000, {"num_kv_heads": 4}, 1_100_048_384),  # TinyLlama 1.1B
    ],
)
def test_llama_sizes_follow_from_the_default_mlp_width(
    hidden: int, heads: int, layers: int, vocab: int, changes: dict[str, Any], published: int
) -> None:
    """The rule for intermediate_size is worth having only if it gives the published models."""
    settings = ModelSettings(
        name="llama", num_layers=layers, num_heads=heads, hidden_size=hidden, max_seq_len=64, **changes
    )
    assert parameter_count(settings, vocab) == published


def test_flops_follow_the_modules_that_are_there() -> None:
    """Utilisation of a low-rank run would be overstated by the dense count."""
    settings, seq_len = tiny(), 16
    matrices = 2 * (4 * 32 * 32 + 2 * 4 * 32 * 32) + 32 * VOCAB
    attention = 12 * 2 * 32 * seq_len
    model = on_meta(settings)
    assert flops_per_token(model, seq_len) == 6 * matrices + attention
    assert flops_per_token(on_meta(tiny(tie_embeddings=False)), seq_len) == 6 * matrices + attention
    rank = 5
    low_rank = nn.Sequential(nn.Linear(32, rank, bias=False), nn.Linear(rank, 128))
    model.set_submodule("blocks.0.mlp.up", low_rank)
    matrices += rank * (32 + 128) - 32 * 128
    assert flops_per_token(model, seq_len) == 6 * matrices + attention
    # A frozen matrix passes gradients on but has none of its own: two of the three products.
    model.get_parameter("blocks.1.mlp.up.weight").requires_grad_(False)
    assert flops_per_token(model, seq_len) == 6 * matrices - 2 * 32 * 128 + attention


# Settings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "key", "remedy"),
    [
        ({"name": "bert"}, "model.name is 'bert'", "write gpt2, llama or hf"),
        ({"num_layers": 0}, "model.num_layers is 0", "above 0"),
        ({"num_heads": -1}, "model.num_heads is -1", "above 0"),
        ({"hidden_size": 0}, "model.hidden_size is 0", "above 0"),
        ({"intermediate_size": 0}, "model.intermediate_size is 0", "above 0"),
        ({"max_seq_len": 0}, "model.max_seq_len is 0", "above 0"),
        ({"norm_eps": 0.0}, "model.norm_eps is 0.0", "above 0"),
        ({"name": "llama", "rope_theta": math.nan}, "model.rope_theta is nan", "above 0"),
        ({"name": "llama", "num_kv_heads": 0}, "model.num_kv_heads is 0", "above 0"),
        ({"dropout": 1.0}, "model.dropout is 1.0", "from 0 to below 1"),
        ({"dropout": -0.1}, "model.dropout is -0.1", "from 0 to below 1"),
        ({"hidden_size": 30}, "model.hidden_size is 30", "write model.num_heads 3 or 5, or model.hidden_size 32"),
        ({"num_kv_heads": 4}, "model.num_kv_heads is 4", "model.name: llama"),
        ({"rope_theta": 1e4}, "model.rope_theta is 10000.0", "model.name: llama"),
        ({"name": "llama", "num_kv_heads": 3}, "model.num_kv_heads is 3", "write 2 or 4"),
        (
            {"name": "llama", "hidden_size": 36},
            "model.hidden_size is 36",
            "write model.num_heads 3 or 6, or model.hidden_size 40",
        ),
        ({"name": "llama", "dropout": 0.1}, "model.dropout is 0.1", "model.name: gpt2"),
    ],
)
def test_settings_that_cannot_be_built_say_what_to_write(changes: dict[str, Any], key: str, remedy: str) -> None:
    """One line with the dotted key, the value and the remedy is all that a user gets to see."""
    with pytest.raises(UserError) as caught:
        tiny(**changes)
    text = str(caught.value)
    assert key in text and remedy in text.rpartition("; ")[2] and "\n" not in text


def test_defaults_depend_on_the_architecture() -> None:
    """What is left out must stay left out, or a dumped configuration would not load again."""
    gpt2, llama = tiny(), tiny("llama")
    assert (gpt2.mlp_size, gpt2.tied, gpt2.kv_heads) == (128, True, 4)
    assert (llama.mlp_size, llama.tied, llama.kv_heads, llama.rotary_base) == (128, False, 4, 10000.0)
    assert gpt2.num_kv_heads is gpt2.intermediate_size is gpt2.tie_embeddings is None
    assert tiny("llama", hidden_size=768).mlp_size == 2048


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_layers_add_the_output_of_the_same_layer_in_the_block_before(name: str) -> None:
    """Layer crossing, with hooks on the linear layers of a model that has none."""
    settings = tiny(name, num_layers=3)
    model, plain = fill_by_rule(built(tiny(name, num_layers=3, layer_crossing=True))), fill_by_rule(built(settings))
    outputs: dict[str, Tensor] = {}

    def add(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        _, block, _, layer_name = names[layer].split(".")
        crossed = output + outputs[layer_name] if int(block) else output
        outputs[layer_name] = output
        return crossed

    names = {layer: name for name, layer in plain.named_modules() if isinstance(layer, nn.Linear) and "blocks" in name}
    assert len(names) == 3 * (6 if name == "gpt2" else 7)
    tokens = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    without = plain(tokens)
    for layer in names:
        layer.register_forward_hook(add)
    expected = plain(tokens)
    torch.testing.assert_close(model(tokens), expected)
    assert not torch.allclose(expected, without, rtol=1e-2)
