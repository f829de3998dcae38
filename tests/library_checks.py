"""What test_library.py does in each process."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

import inrank_dist as inrank
from inrank_dist.method.settings import LowRankSettings
from inrank_dist.runtime.context import Context

VOCABULARY, LENGTH, BATCH = 64, 12, 12


class OwnBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(20, 33), nn.Linear(33, 20)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Own(nn.Module):
    """A model of nobody's: a buffer, a module that is used twice, a tied head, a frozen part, a 0-dimensional
    parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 20)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 20))
        self.register_buffer("seen", torch.zeros(()), persistent=True)
        self.frozen = nn.Linear(20, 20)
        self.frozen.requires_grad_(False)
        self.shared = nn.Linear(20, 20)
        self.also_shared = self.shared
        self.blocks = nn.ModuleList(OwnBlock() for _ in range(3))
        self.gain = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(20, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, std=0.2)

    def forward(self, ids: Tensor, *, labels: Tensor | None = None) -> Any:
        x = self.embed(ids) * self.scale
        x = x + self.frozen(x)
        if self.training:
            self.seen += 1
        for block in self.blocks:
            x = block(x) + 0.1 * self.shared(x)
        logits = self.head(x * self.gain)
        if labels is None:
            return logits
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": VOCABULARY}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=VOCABULARY))


def qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen3Config(**sizes, num_key_value_heads=1, head_dim=12, vocab_size=VOCABULARY)
    return Qwen3ForCausalLM(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "own": (Own, [r"\.(up|down)$"]),
    "gpt2": (gpt2, ["all"]),
    "llama": (llama, ["all"]),
    "qwen3": (qwen3, ["mlp"]),
}


def method(targets: list[str], **options: Any) -> LowRankSettings:
    """Growth after steps 3 and 6, the freeze after 9."""
    settings = {"initial_rank": 2, "buffer": 3, "threshold": 0.9, "interval": 3, "freeze_step": 9, "multiple_of": 1}
    return inrank.InRank(targets, **{**settings, **options})


def shard(model: nn.Module, world_size: int, replicas: int = 1) -> None:
    """FSDP2 as a user would write it: each block, then the rest."""
    sizes, names = (world_size,), ("shard",)
    if replicas > 1:
        sizes, names = (replicas, world_size // replicas), ("replicate", "shard")
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    for block in next(m for m in model.modules() if isinstance(m, nn.ModuleList)):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def make_run(name: str, how: str = "local", world_size: int = 1, **options: Any) -> inrank.LowRankRun:
    build, targets = MODELS[name]
    ways: dict[str, dict[str, Any]] = {
        "local": {},
        "fsdp": {"parallelize": partial(shard, world_size=world_size)},
        "hybrid": {"parallelize": partial(shard, world_size=world_size, replicas=2)},
        "ddp": {"wrap": DistributedDataParallel},
    }
    return inrank.LowRankRun(
        build,
        method(targets, **options),
        lambda groups: torch.optim.AdamW(groups, lr=1e-2),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step)),
        seed=3,
        **ways[how],
    )


def whole_batch(step: int) -> Tensor:
    """Tokens of all processes of one step; not random, so that there is something to learn."""
    start = torch.randint(VOCABULARY, (BATCH, 1), generator=torch.Generator().manual_seed(step))
    return (start + torch.arange(LENGTH) * (1 + start % 3)) % VOCABULARY


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    if type(getattr(model, "module", model)).__name__.removeprefix("FSDP") == "Own":
        return model(ids[:, :-1], labels=ids[:, 1:])
    return model(input_ids=ids, labels=ids).loss


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(ids)
    return out if torch.is_tensor(out) else out.logits


def train(run: inrank.LowRankRun, steps: int, rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    """Train a run as a user's loop does; losses, ranks and how much each growth moved the logits."""
    losses, jumps, actions = [], [], []
    probe = whole_batch(999)
    while run.step < steps:
        run.model.train()
        mine = whole_batch(run.step).chunk(world_size)[rank]
        loss = loss_of(run.model, mine)
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        assert run.scheduler is not None
        run.scheduler.step()
        run.model.eval()
        before = logits_of(run.model, probe)
        for record in run.after_step(partial(_backward, run, mine)):
            if record["kind"] == "rank_event":
                actions.append(record["action"])
                if record["action"] == "grow" and run._holder._base_scale == 1.0:
                    run.model.eval()
                    jumps.append(float((logits_of(run.model, probe) - before).abs().max()))
        total = loss.detach().clone()
        if world_size > 1:
            dist.all_reduce(total)
        losses.append(float(total) / world_size)
    run.model.eval()
    return {
        "losses": losses,
        "ranks": run.ranks,
        "jumps": jumps,
        "actions": actions,
        "logits": logits_of(run.model, probe),
        "merged": logits_of(run.merge().eval(), probe),
        "lr": run.optimizer.param_groups[0]["lr"],
    }


def _backward(run: inrank.LowRankRun, ids: Tensor) -> None:
    loss_of(run.model, ids).backward()


def in_processes(name: str, how: str, steps: int, options: dict[str, Any], save: str = "", load: str = "") -> Any:
    """A run in each process of the pool."""
    context = Context()
    context.start(60)
    try:
        run = make_run(name, how, context.world_size, **options)
        if load:
            run.load(load)
        result = train(run, steps, context.rank, context.world_size)
        if save:
            run.save(save)
        return result
    finally:
        context.stop()


def alone(name: str, steps: int, options: dict[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """The same in this process."""
    run = make_run(name, **options)
    result = train(run, steps)
    if folder is not None:
        run.save(folder)
    return result


def refusals() -> list[str]:
    """What is said of shardings that cannot work."""
    context = Context()
    context.start(60)
    mesh = init_device_mesh("cpu", (context.world_size,))
    other = init_device_mesh("cpu", (2, context.world_size // 2), mesh_dim_names=("a", "b"))
    ways: list[dict[str, Any]] = [
        {"parallelize": lambda m: fully_shard(m, mesh=mesh, shard_placement_fn=lambda p: Shard(p.ndim - 1))},
        {"parallelize": lambda m: fully_shard(m, mesh=other["a"])},
        {"wrap": lambda m: FullyShardedDataParallel(m, device_id=torch.device("cpu"), use_orig_params=True)},
    ]
    said = []
    try:
        for way in ways:
            try:
                inrank.LowRankRun(
                    llama, method(["all"], buffer=6), lambda groups: torch.optim.SGD(groups, lr=0.1), **way
                )
                said.append("nothing")
            except inrank.UserError as error:
                said.append(str(error))
    finally:
        context.stop()
    return said
