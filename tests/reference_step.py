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
    bottleneck: bool = False
    crossing: bool = False


def logits(model: Model, p: Tensors, tokens: Tensor, fade: float) -> Tensor:
    """``(B, T, vocabulary)`` for ``(B, T)`` tokens; ``fade`` is what is left of the dense bases."""
    is_gpt2 = model.name == "gpt2"
    before: dict[str, Tensor] = {}

    def linear(name: str, x: Tensor) -> Tensor:
        own, layer = product(name, x), name.split(".")[-1]
        y = own + before[layer] if model.crossing and layer in before else own
        before[layer] = own
        return y

    def product(name: str, x: Tensor) -> Tensor:
        if f"{name}.U" in p and model.bottleneck:
            inner = x @ p[f"{name}.V"]
            return (inner * inner.sigmoid()) @ p[f"{name}.U"].T + p[f"{name}.bias"]
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


def newton_schulz(X: Tensor) -> Tensor:
    """Five quintic steps of Muon (Jordan et al. 2024) from ``X`` over its Frobenius norm, on the shorter side."""
    if X.shape[0] > X.shape[1]:
        return newton_schulz(X.T).T
    X = X.double() / max(float(X.double().norm()), 1e-7)
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X


def stretch(out_features: int, in_features: int) -> float:
    """By which an orthogonalised update is multiplied."""
    return math.sqrt(max(1.0, out_features / in_features))


def muon(p: Tensor, mix: Tensor, *, lr: float, decay: float) -> Tensor:
    """A matrix after a step along the mix of momentum and gradient."""
    return (1 - lr * decay) * p.double() - lr * stretch(*p.shape) * newton_schulz(mix)


def factors_after(
    rule: str, U: Tensor, V: Tensor, mix_U: Tensor, mix_V: Tensor, *, lr: float, decay: float
) -> tuple[Tensor, Tensor]:
    """A pair of factors after a step of ``spectron`` (arXiv 2602.12429) or ``lora_muon`` (arXiv 2606.12921)."""
    U, V, mix_U, mix_V = (each.double() for each in (U, V, mix_U, mix_V))
    if rule == "spectron":
        scale = float(torch.linalg.matrix_norm(U, 2) + torch.linalg.matrix_norm(V, 2) + 1)
        step_U, step_V = newton_schulz(mix_U) / scale, newton_schulz(mix_V) / scale
    else:
        S_U, S_V, eye = U.T @ U, V.T @ V, torch.eye(U.shape[1], dtype=U.dtype)
        floor_U, floor_V = (0.1 * float(S.trace()) / len(S) * eye for S in (S_V, S_U))  # new modes have U = 0
        root_U, root_V = _inverse_root(S_U + floor_U), _inverse_root(S_V + floor_V)
        step_U, step_V = newton_schulz(mix_U @ root_V) @ root_V / 2, newton_schulz(mix_V @ root_U) @ root_U / 2
    shrink, step = math.sqrt(1 - lr * decay), lr * stretch(U.shape[0], V.shape[0])
    return shrink * U - step / shrink * step_U, shrink * V - step / shrink * step_V


def _inverse_root(S: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(S)
    return vectors / values.sqrt() @ vectors.T
