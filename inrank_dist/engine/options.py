"""Options of the trainer's engines."""

from dataclasses import dataclass

from ..lowrank.layer import Activation


@dataclass(frozen=True)
class BuildOptions:
    """Precision, compilation and gradient handling of an engine.

    Attributes:
        bf16: compute in bfloat16. Weights, gradients and moments stay float32.
        compile: compile each block and the loss, with dynamic ranks while they grow and static shapes afterwards.
        cuda_graph: replay compiled blocks as CUDA graphs once shapes are static (GPUs only).
        fuse: apply the factors ``V`` of layers with the same input in one matrix product.
        activation: nonlinearity between the factors.
        activation_checkpointing: recompute each block in the backward pass.
        grad_clip: maximum gradient norm. 0: no clipping.
        frobenius_decay: coefficient of the decoupled decay of ``|U V^T|_F^2 / 2``. 0: no decay.
        frobenius_in_loss: add the gradient of the decay to that of the loss instead.
        outer_lr_scale: learning rate of ``U`` and ``V`` of deep layers as a multiple of the other parameters'.
        reduce_each_micro_batch: reduce-scatter gradients after every micro-batch instead of the last one, so that
            unsharded gradients are not kept (FSDP2).
    """

    bf16: bool = False
    compile: bool = False
    cuda_graph: bool = False
    fuse: bool = True
    activation: Activation = "none"
    activation_checkpointing: bool = False
    grad_clip: float = 1.0
    frobenius_decay: float = 0.0
    frobenius_in_loss: bool = False
    outer_lr_scale: float = 1.0
    reduce_each_micro_batch: bool = True
