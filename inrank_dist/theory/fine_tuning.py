"""A small transformer that reads digits, and the methods that fine-tune it: LoRA of ``peft``, and ``DeepLoRA``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..library import DeepLoRA, LowRankRun
from ..lowrank.init import generator_for
from ..runtime.errors import UserError
from .digits import load_digits

TARGETS = ("query", "key", "value", "out", "up", "down")
SIDE, CLASSES = 8, 10
Batches = list[tuple[Tensor, Tensor]]


class Block(nn.Module):
    """A pre-norm transformer block without dropout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Reader(nn.Module):
    """Images ``(B, 8, 8)`` to logits ``(B, 10)``; a row of an image is a token."""

    def __init__(self, width: int, blocks: int, heads: int) -> None:
        super().__init__()
        self.sizes = width, blocks, heads
        self.embed = nn.Linear(SIDE, width)
        self.positions = nn.Parameter(torch.randn(SIDE, width) / width**0.5)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


@dataclass(frozen=True)
class Data:
    """Images and labels: upright ones to pre-train on, turned ones to fine-tune on, to choose rates and to test."""

    upright: tuple[Tensor, Tensor]
    pool: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load_data(seed: int) -> Data:
    """Divide the 1,797 images at random: 797, 300, 200 and 500. The last 500, for tests, are the same for all seeds."""
    images, labels = load_digits()
    order = torch.randperm(len(labels), generator=generator_for(0, "deep-lora", "test"))
    others = torch.randperm(1297, generator=generator_for(seed, "deep-lora", "data"))
    order[:1297] = order[:1297][others]
    images, labels = images[order], labels[order]
    turned = images.rot90(dims=(1, 2)).contiguous()
    ends = (797, 1097, 1297, 1797)
    return Data(
        (images[: ends[0]], labels[: ends[0]]),
        *((turned[a:b], labels[a:b]) for a, b in pairwise(ends)),
    )


def batches(data: tuple[Tensor, Tensor], size: int, steps: int, generator: torch.Generator) -> Batches:
    """Random batches, or all of the data in each where it has at most ``size`` images."""
    images, labels = data
    if len(labels) <= size:
        return [data] * steps
    chosen = (torch.randperm(len(labels), generator=generator)[:size] for _ in range(steps))
    return [(images[index], labels[index]) for index in chosen]


def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Share of the images that are read correctly."""
    with torch.no_grad():
        return float((model(data[0]).argmax(1) == data[1]).float().mean())


def pretrained(sizes: tuple[int, int, int], steps: int, data: Data, seed: int) -> Reader:
    """Train a reader of a width, a number of blocks and of heads on upright images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Reader(*sizes).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = generator_for(seed, "deep-lora", "pretrain")
    for images, labels in batches(data.upright, 64, steps, generator):
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False)


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned model.

    Attributes:
        parameters: number of trained parameters.
        loss: mean over the last ten batches.
    """

    model: nn.Module
    parameters: int
    loss: float


Method = Callable[[Reader, Batches, int, float, int], Tuned]
"""Pre-trained model, batches, rank, learning rate and seed -> fine-tuned model."""


def lora(model: Reader, steps: Batches, rank: int, rate: float, seed: int) -> Tuned:
    """LoRA of ``peft``, with a scale of 1."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError("deep-lora compares with the LoRA of peft; write pip install scikit-learn peft") from None
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS), bias="none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted: Any = get_peft_model(copy.deepcopy(model), config)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    losses = []
    for images, labels in steps:
        loss = F.cross_entropy(adapted(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return Tuned(adapted, sum(p.numel() for p in trained), sum(losses[-10:]) / len(losses[-10:]))


def deep(depth: int, **options: Any) -> Method:
    """Deep LoRA of a depth; biases and all else are frozen, as with ``peft``."""

    def tune(model: Reader, steps: Batches, rank: int, rate: float, seed: int) -> Tuned:
        def make() -> nn.Module:
            return Reader(*model.sizes).double()

        method = DeepLoRA(rf"\.({'|'.join(TARGETS)})$", initial_rank=rank, depth=depth, **options)
        run = LowRankRun(
            make,
            method,
            lambda groups: torch.optim.AdamW(groups, lr=rate, weight_decay=0.0),
            initial=copy.deepcopy(model).requires_grad_(True),
            seed=seed,
            device="cpu",
        )

        def backward(images: Tensor, labels: Tensor) -> float:
            loss = F.cross_entropy(run.model(images), labels)
            loss.backward()
            return float(loss.detach())

        if method.outer_init == "gradient":
            run.start(lambda: backward(*steps[0]))
        losses = []
        for images, labels in steps:
            losses.append(backward(images, labels))
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.after_step()
        trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
        return Tuned(run.model, trained, sum(losses[-10:]) / len(losses[-10:]))

    return tune
