"""Latent crossing (LaX, Zhang et al., arXiv 2505.21732): layers pass their latents on to the next block."""

from typing import Any

from torch import Tensor, nn


class Crossing:
    """Adds the latent of the same layer in the block before to that of a layer: ``y = (h + h') @ U.T``, ``h = x @ V``.

    The model moves latents from block to block (``models.layers.Block``), as inputs and outputs of the blocks, so that
    recomputed, compiled and sharded blocks see them.

    Attributes:
        received: ``h': (..., R)``; None in the first block.
        latent: ``h: (..., R)``, for the next block.
    """

    received: Tensor | None = None
    latent: Tensor | None = None

    def __call__(self, latent: Tensor) -> Tensor:
        """``h`` to ``h + h'``."""
        self.latent = latent
        return latent if self.received is None else latent + self.received


def cross_outputs(layer: nn.Linear) -> None:
    """Have a dense layer cross: its output ``(..., out)`` takes the place of the latent."""
    layer.crossing = Crossing()  # type: ignore[assignment]
    layer.register_forward_hook(_crossed)


def _crossed(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    crossed: Tensor = layer.crossing(output)  # type: ignore[operator]
    return crossed
