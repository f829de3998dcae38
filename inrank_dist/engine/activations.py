"""Activation memory of one micro-batch, measured with a forward and backward pass on fake tensors.

Fake tensors have shapes and dtypes but no storage. The pass runs the code of the model, so the estimate includes all
tensors saved for the backward pass and the temporaries of the loss. It excludes temporaries inside an operator, such as
attention or a reduction.
"""

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ..models import LanguageModel
from ..models.layers import Attention


@dataclass(frozen=True)
class Activations:
    """Peak memory of one micro-batch in bytes, without parameters and gradients.

    Attributes:
        peak: peak of the whole model.
        one_block: peak of the model with a single block. It bounds the activations left at the end of the backward
            pass.
    """

    peak: int
    one_block: int


class _Live(TorchDispatchMode):
    """Dispatch mode that counts the bytes of live storages allocated by operators."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.sizes = {id(tensor.untyped_storage()): 0 for tensor in known}
        self.known = [tensor.untyped_storage() for tensor in known]
        self.references: dict[int, Any] = {}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and id(storage := leaf.untyped_storage()) not in self.sizes:
                self.sizes[id(storage)] = storage.nbytes()
                self.references[id(storage)] = weakref.ref(storage, partial(self._gone, id(storage)))
                self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        return made

    def _gone(self, key: int, _: Any) -> None:
        self.live -= self.sizes.pop(key)
        del self.references[key]

    def keep(self, parameter: Tensor) -> None:
        """Stop counting the gradient of a parameter, which is not an activation."""
        assert parameter.grad is not None
        key = id(parameter.grad.untyped_storage())
        self.live -= self.sizes.get(key, 0)
        self.sizes[key] = 0


def micro_batch_activations(
    module: LanguageModel, batch_size: int, seq_len: int, *, bf16: bool, checkpointing: bool, on_gpu: bool = True
) -> Activations:
    """Measure the activation memory of an unsharded model, run as the engines run it without ``train.compile``.

    All blocks have inputs and outputs of the same shape, so a block adds the same number of bytes at any depth. The
    model is run with one and with two copies of each distinct block, and the difference is counted for every such
    block. The peaks of the forward and the backward pass are measured separately, because only the forward pass holds
    autocast's copies of all weights.

    Args:
        module: model on ``meta``.
        batch_size: sequences in the micro-batch.
        seq_len: tokens in a sequence.
        bf16: whether to compute in bfloat16.
        checkpointing: whether each block is recomputed in the backward pass.
        on_gpu: whether attention runs on a GPU, where it does not store its scores. On the CPU, attention with dropout
            stores them.
    """
    run = partial(_peaks, module, batch_size, seq_len, bf16, checkpointing, on_gpu)
    measured: dict[tuple[object, ...], tuple[tuple[int, int], tuple[int, int]]] = {}
    all_blocks = module.plan.block_modules(module)
    structures = [tuple((n, p.shape, p.requires_grad) for n, p in block.named_parameters()) for block in all_blocks]
    for structure, block in zip(structures, all_blocks, strict=True):
        if structure not in measured:
            measured[structure] = run([block]), run([block, block])
    peaks = [
        measured[structures[-1]][0][each] + sum(measured[s][1][each] - measured[s][0][each] for s in structures[:-1])
        for each in (0, 1)
    ]
    return Activations(max(peaks), max(max(alone) for alone, _ in measured.values()))


def _peaks(
    module: LanguageModel,
    batch_size: int,
    seq_len: int,
    bf16: bool,
    checkpointing: bool,
    on_gpu: bool,
    blocks: Sequence[nn.Module],
) -> tuple[int, int]:
    """Return the peak bytes of the forward and of the backward pass of the model with its blocks replaced by these."""
    parent, _, attribute = module.plan.blocks[0].rpartition(".")[0].rpartition(".")
    owner = module.get_submodule(parent)
    own = getattr(owner, attribute)
    try:
        setattr(owner, attribute, nn.ModuleList())
        model = copy.deepcopy(module)
    finally:
        setattr(owner, attribute, own)
    copies = nn.ModuleList(copy.deepcopy(block) for block in blocks)
    setattr(model.get_submodule(parent), attribute, copies)
    for attention in model.modules():
        if on_gpu and isinstance(attention, Attention):
            attention.dropout = 0.0
    with FakeTensorMode():
        model = _faked(model).train()
        for block in copies:
            if checkpointing:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        inputs, targets = (torch.zeros(batch_size, seq_len, dtype=torch.int64) for _ in range(2))
        with _Live([*model.parameters(), *model.buffers(), inputs, targets]) as live:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(live.keep)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(inputs, targets)
            forward, live.peak = live.peak, live.live
            loss.backward()
        return forward, live.peak


def _faked(model: LanguageModel) -> LanguageModel:
    """Replace parameters and buffers of a model on ``meta`` by fake CPU tensors, in place. Tied weights stay tied."""
    made: dict[int, Tensor] = {}
    for owner in model.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            fake = nn.Parameter(torch.empty(parameter.shape), requires_grad=parameter.requires_grad)
            setattr(owner, name, made.setdefault(id(parameter), fake))
        for name, buffer in list(owner.named_buffers(recurse=False)):
            owner.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype), persistent=False)
    return model
