"""How the trainer's engines make a model run."""

from dataclasses import dataclass

from ..lowrank.layer import Activation


@dataclass(frozen=True)
class BuildOptions:
    """How the model is made to run.

    Attributes:
        bf16: compute in bfloat16 (weights, gradients and moments stay float32).
        compile: compile each block and the loss: one graph for all ranks while they grow, static shapes after that.
        cuda_graph: replay compiled blocks as CUDA graphs once shapes are static (GPUs only).
        fuse: run factors that read the same input as one product.
        activation: between the factors.
        activation_checkpointing: recompute each block in the backward pass.
        grad_clip: largest gradient norm; 0: none.
        frobenius_decay: decoupled decay of ``|U V^T|_F^2 / 2``; 0: none.
        reduce_each_micro_batch: reduce-scatter gradients after every micro-batch, so that none is ever held whole
            (FSDP2).
    """

    bf16: bool = False
    compile: bool = False
    cuda_graph: bool = False
    fuse: bool = True
    activation: Activation = "none"
    activation_checkpointing: bool = False
    grad_clip: float = 1.0
    frobenius_decay: float = 0.0
    reduce_each_micro_batch: bool = True
