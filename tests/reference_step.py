"""Training of a language model in plain PyTorch, as a textbook writes it: whole tensors by name, one process.

Nothing here comes from the project. Every engine is held to it, so that what all of them did wrong together would show.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
"""Parameter name -> the whole parameter."""


@dataclass(frozen=True)
class Model:
    """``gpt2`` or ``llama``, and its numbers of heads."""

    name: str
    layers: int
    heads: int
    kv_heads: int


def logits(model: Model, p: Tensors, tokens: Tensor, fade: float) -> Tensor:
    """``(B, T, vocabulary)`` for ``(B, T)`` tokens; ``fade`` is what is left of the dense bases."""
    is_gpt2 = model.name == "gpt2"

    def linear(name: str, x: Tensor) -> Tensor:
        if f"{name}.U" in p:
            W = p[f"{name}.U"] @ p[f"{name}.V"].T
            if f"{name}.base" in p:
                W = W + fade * p[f"{name}.base"]
        else:
            W = p[f"{name}.weight"]
        return x @ W.T + p[f"{name}.bias"] if f"{name}.bias" in p else x @ W.T

    def norm(name: str, x: Tensor) -> Tensor:
        if is_gpt2:
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[f"{name}.weight"]
        return x + p[f"{name}.bias"] if is_gpt2 else x

    def turn(x: Tensor) -> Tensor:
        """Rotary positions: channel i is the real part and i + D/2 the imaginary part of a number that turns."""
        half = x.shape[-1] // 2
        speed = 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
        angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * speed
        turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag], -1)

    def attention(name: str, x: Tensor) -> Tensor:
        B, T, C = x.shape
        D = C // model.heads
        q, k, v = (linear(f"{name}.{part}", x).view(B, T, -1, D).transpose(1, 2) for part in "qkv")
        if not is_gpt2:
            q, k = turn(q), turn(k)
        k, v = (each.repeat_interleave(model.heads // model.kv_heads, dim=1) for each in (k, v))
        scores = q @ k.transpose(2, 3) / math.sqrt(D)
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        return linear(f"{name}.out", mixed.transpose(1, 2).reshape(B, T, C))

    def mlp(name: str, x: Tensor) -> Tensor:
        up = linear(f"{name}.up", x)
        if is_gpt2:
            cubic = math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)
            return linear(f"{name}.down", 0.5 * up * (1 + cubic.tanh()))
        gate = linear(f"{name}.gate", x)
        return linear(f"{name}.down", gate * gate.sigmoid() * up)

    x = p["tok_embed.weight"][tokens]
    if is_gpt2:
        x = x + p["pos_embed.weight"][: tokens.shape[1]]
    for index in range(model.layers):
        block = f"blocks.{index}"
        x = x + attention(f"{block}.attention", norm(f"{block}.attention_norm", x))
        x = x + mlp(f"{block}.mlp", norm(f"{block}.mlp_norm", x))
    head = p.get("head.weight", p["tok_embed.weight"])
    return norm("final_norm", x) @ head.T


def loss_and_gradients(
    model: Model, parameters: Tensors, inputs: Tensor, targets: Tensor, fade: float
) -> tuple[float, dict[str, Tensor]]:
    """Mean cross-entropy of the global batch in nats, and its gradient for whatever learns: all but the bases."""
    p = {name: tensor.double() for name, tensor in parameters.items()}
    learns = {name: tensor.requires_grad_() for name, tensor in p.items() if not name.endswith(".base")}
    chances = logits(model, p, inputs, fade).log_softmax(-1)
    loss = -chances.gather(-1, targets[..., None]).mean()
    return float(loss), dict(zip(learns, torch.autograd.grad(loss, list(learns.values())), strict=True))


def clipped(gradients: Tensors, most: float) -> tuple[float, dict[str, Tensor]]:
    """The norm of all gradients together, and the gradients made shorter where it is above ``most`` (0: never)."""
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
    scale = most / norm if most and norm > most else 1.0
    return norm, {name: scale * gradient for name, gradient in gradients.items()}


def is_decayed(name: str) -> bool:
    """Weight decay is for the matrices of linear layers: not for embeddings, norms and biases."""
    owner, _, kind = name.rpartition(".")
    layer = owner.rpartition(".")[2]
    return kind in ("U", "V") or (kind == "weight" and layer in ("q", "k", "v", "out", "up", "gate", "down", "head"))


def learning_rate(peak: float, step: int, steps: int, warmup: int, least: float) -> float:
    """Of the step after ``step`` completed ones: up in a line over ``warmup`` steps, then half a cosine down to
    ``least`` of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (least + (1 - least) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2)


def adamw(
    p: Tensor, m: Tensor, v: Tensor, *, step: int, lr: float, decay: float, betas: tuple[float, float], eps: float
) -> Tensor:
    """A parameter after step ``step`` (the first is 1) by moments that have seen its gradient (arXiv 1711.05101)."""
    p, m, v = p.double(), m.double() / (1 - betas[0] ** step), v.double() / (1 - betas[1] ** step)
    return p - lr * decay * p - lr * m / (v.sqrt() + eps)
