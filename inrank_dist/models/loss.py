"""Cross-entropy of tokens, without the float32 logits of all of them at once where a vocabulary is large."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED_TARGET = -100

CHUNK = 2**25
"""Logits that are in memory at once, 128 MiB in float32."""


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits ``(B, T, vocabulary)`` of any dtype and targets ``(B, T)`` int64 -> nats, a float32 scalar."""
    return F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED_TARGET, reduction="sum"
    )


class LossHead(nn.Linear):
    """A linear layer to the logits that gives the summed loss instead where ``targets`` are set.

    The loss is made in the layer's own call, because engines that shard a layer gather its weight for that call, once.
    Up to ``CHUNK`` logits it is ``summed_loss`` of them. Above, ``ChunkedLoss`` makes the loss and its gradients one
    chunk of tokens after the other.

    For a vocabulary of 151,936, width 256 and 2,048 tokens in float32 on the CPU, forward and backward pass allocate
    at most 3,734 MB with all logits at once and 291 MB in chunks, of which 156 MB are the gradient of the weight
    (``train.memory.peak_extra_bytes``).

    Attributes:
        targets: ``(B, T)`` int64, or None; set for the time of one call.
    """

    targets: Tensor | None = None

    @classmethod
    def of(cls, linear: nn.Linear) -> "LossHead":
        """The same layer, with the same parameters."""
        head = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        head.weight, head.bias = linear.weight, linear.bias
        return head.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """``(B, T, in)`` -> logits ``(B, T, out)``, or the loss, a float32 scalar."""
        if self.targets is None:
            return super().forward(input)
        if self.targets.numel() * self.out_features <= CHUNK:
            return summed_loss(super().forward(input), self.targets)
        dtype, kind = input.dtype, input.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            loss: Tensor = ChunkedLoss.apply(
                input.flatten(0, -2).to(dtype),
                self.weight.to(dtype),
                None if self.bias is None else self.bias.to(dtype),
                self.targets.flatten(),
                torch.is_grad_enabled(),
            )
        return loss


class ChunkedLoss(torch.autograd.Function):
    """``summed_loss(linear(x, weight, bias), targets)``, with gradients made in the forward pass.

    The gradient of the logits is ``softmax - one_hot(target)``. A chunk's is used for those of ``x``, ``weight`` and
    ``bias`` at once, summed in float32, and is then forgotten, so that no logit is computed twice.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, gradients: bool) -> Tensor:
        """``x (N, in)``, ``weight (out, in)``, ``bias (out,)`` of one dtype, ``targets (N,)`` int64 -> nats, float32.

        Args:
            gradients: whether any will be asked for.
        """
        wanted = [gradients and needed for needed in ctx.needs_input_grad[:3]]
        of_x = torch.empty_like(x) if wanted[0] else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if wanted[2] and bias is not None else None
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        rows = max(CHUNK // weight.shape[0], 1)
        for start in range(0, x.shape[0], rows):
            part, target = x[start : start + rows], targets[start : start + rows, None]
            counted = target != IGNORED_TARGET
            target = target.masked_fill(~counted, 0)
            logits = F.linear(part, weight, bias).float()
            # In place from here: a chunk takes its logits once.
            logits -= logits.amax(1, keepdim=True)
            chosen = logits.gather(1, target)
            total = logits.exp_().sum(1, keepdim=True)
            loss += ((total.log() - chosen) * counted).sum()
            if not any(wanted):
                continue
            logits *= counted / total
            logits.scatter_add_(1, target, -counted.to(logits.dtype))
            gradient = logits.to(x.dtype)
            if of_x is not None:
                torch.mm(gradient, weight, out=of_x[start : start + rows])
            if of_weight is not None:
                if x.dtype == torch.float32:
                    of_weight.addmm_(gradient.T, part)
                else:
                    of_weight += gradient.T @ part
            if of_bias is not None:
                of_bias += logits.sum(0)
            del logits, gradient  # before the next chunk is made
        ctx.made = [of_x, of_weight, of_bias]
        ctx.dtype = x.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Each gradient times that of the loss, a scalar, in place."""
        made, ctx.made = ctx.made, None
        if made is None:
            raise RuntimeError("the loss was differentiated twice")
        return *(None if each is None else each.mul_(outputs[0]).to(ctx.dtype) for each in made), None, None
