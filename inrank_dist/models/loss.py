"""Summed cross-entropy, computed in chunks for large vocabularies to limit the memory of the logits."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED_TARGET = -100

CHUNK = 2**25
"""Maximum number of logits in memory at once (128 MiB in float32)."""


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of the token cross-entropies in nats, a float32 scalar.

    Args:
        logits: ``(B, T, vocab_size)`` of any floating-point dtype.
        targets: ``(B, T)`` int64, with ``IGNORED_TARGET`` at positions to ignore.
    """
    return F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED_TARGET, reduction="sum"
    )


class LossHead(nn.Linear):
    """An output layer that returns the logits, or the summed loss while ``targets`` is set.

    The loss is computed in the forward pass of the layer, because engines that shard the layer gather its weight once
    for that call. Up to ``CHUNK`` logits it is ``summed_loss``. For more logits, ``ChunkedLoss`` computes the loss and
    its gradients chunk by chunk.

    Attributes:
        targets: ``(B, T)`` int64 or None. Set only during a call.
    """

    targets: Tensor | None = None

    @classmethod
    def of(cls, linear: nn.Linear) -> "LossHead":
        """Create a ``LossHead`` that shares the parameters of a linear layer."""
        head = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        head.weight, head.bias = linear.weight, linear.bias
        return head.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """``(B, T, in)`` -> logits ``(B, T, out)``, or the loss in nats as a float32 scalar."""
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
    """``summed_loss(linear(x, weight, bias), targets)`` with gradients computed in the forward pass.

    The gradient of the logits is ``softmax(logits) - one_hot(target)``. The forward pass computes it for one chunk of
    tokens at a time and adds its contribution to the gradients of ``x``, ``weight`` and ``bias``, so the logits are
    never recomputed. The gradients of ``weight`` and ``bias`` are accumulated in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, gradients: bool) -> Tensor:
        """Return the summed loss in nats, a float32 scalar.

        Args:
            x: ``(N, in)``.
            weight: ``(out, in)``, in the dtype of ``x``.
            bias: ``(out,)``, in the dtype of ``x``, or None.
            targets: ``(N,)`` int64.
            gradients: whether gradients are needed.
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
            # In place, so that a chunk needs the memory of its logits only once.
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
            del logits, gradient  # free the memory before the next chunk
        ctx.made = [of_x, of_weight, of_bias]
        ctx.dtype = x.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients in place by the gradient of the loss, a scalar.

        Raises:
            RuntimeError: if called twice for one forward pass.
        """
        made, ctx.made = ctx.made, None
        if made is None:
            raise RuntimeError("the loss was differentiated twice")
        return *(None if each is None else each.mul_(outputs[0]).to(ctx.dtype) for each in made), None, None
