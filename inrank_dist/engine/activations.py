"""What one micro-batch takes beside weights, gradients and moments: its forward and backward pass, run on fake tensors.

Fake tensors have shapes and dtypes but no memory, and the pass is the real one: whatever a model saves for its backward
pass, and whatever is alive for a moment at its loss, is seen without a formula for every layer. Temporaries inside an
operator (of attention, of a reduction) are not.
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
    """Bytes that one micro-batch takes at its worst moment, beside weights and gradients.

    Attributes:
        peak: of the model.
        one_block: of the model with one of its blocks alone: what is left of it when the last gradients are made.
    """

    peak: int
    one_block: int


class _Live(TorchDispatchMode):
    """Counts the bytes of the storages that operators make, as long as they live."""

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
        """A gradient that is finished is no activation."""
        assert parameter.grad is not None
        key = id(parameter.grad.untyped_storage())
        self.live -= self.sizes.get(key, 0)
        self.sizes[key] = 0


def micro_batch_activations(
    module: LanguageModel, batch_size: int, seq_len: int, *, bf16: bool, checkpointing: bool, on_gpu: bool = True
) -> Activations:
    """Of an unsharded model on ``meta``, run as the engines run it without ``train.compile``.

    All blocks take and return tensors of one shape, so a block adds the same bytes wherever it stands. One block of
    each structure is run alone and twice in a row, and the difference is counted for every such block. The peaks of the
    forward and the backward pass are kept apart: only the forward pass holds autocast's copies of all weights.

    Args:
        batch_size, seq_len: of the micro-batch.
        bf16: computes in bfloat16.
        checkpointing: recomputes each block in the backward pass.
        on_gpu: attention with dropout stores no scores; on the CPU it does.
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
    """Most bytes in the forward and in the backward pass of the model with these blocks instead of its own."""
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
    """Give a model on ``meta`` fake parameters and buffers on the CPU, in place; tied ones stay one."""
    made: dict[int, Tensor] = {}
    for owner in model.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            fake = nn.Parameter(torch.empty(parameter.shape), requires_grad=parameter.requires_grad)
            setattr(owner, name, made.setdefault(id(parameter), fake))
        for name, buffer in list(owner.named_buffers(recurse=False)):
            owner.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype), persistent=False)
    return model
