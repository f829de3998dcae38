"""Parameters of a low-rank checkpoint, read and merged one layer at a time."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..lowrank.convert import Layout
from ..lowrank.cores import absorbed
from ..lowrank.kinds import kind_of
from ..lowrank.layer import core_names
from ..lowrank.spectrum import Factors
from ..lowrank.truncate import truncated
from ..models import LanguageModel
from ..runtime.errors import UserError

Read = Callable[[str], Tensor]
"""Parameter name -> the whole tensor, on the CPU."""


@dataclass(frozen=True)
class Cut:
    """A further truncation of the products ``U @ V.T``.

    Attributes:
        rank: highest rank of a layer, or None.
        energy: share of the squared singular values of each layer to keep, in (0, 1], or None.
    """

    rank: int | None = None
    energy: float | None = None


@dataclass(frozen=True)
class Kept:
    """The result of a truncation.

    Attributes:
        rank: rank of the truncated product.
        discarded: sum of the squared singular values that were discarded.
        energy: sum of all squared singular values.
    """

    rank: int
    discarded: float
    energy: float

    @property
    def share(self) -> float:
        """Share of the energy that was discarded."""
        return self.discarded / self.energy if self.energy else 0.0


class Weights:
    """The parameters of a checkpoint as those of its dense model. At most one layer is in memory.

    Args:
        skeleton: the dense model on ``meta``.
        layout: the low-rank layers of the checkpoint.
        read: reads one parameter of the checkpoint.
        base_scale: scale ``a`` of the bases at the checkpoint's step.
        cut: further truncation of the products, or None.

    Attributes:
        kept: result of the truncation of each layer read so far, by layer name. Empty without ``cut``.
    """

    def __init__(
        self, skeleton: LanguageModel, layout: Layout, read: Read, base_scale: float, cut: Cut | None = None
    ) -> None:
        self.skeleton, self.layout, self.read, self.cut = skeleton, layout, read, cut
        self.base_scale = torch.tensor(base_scale, dtype=torch.float32).item()  # as layers apply it
        self.kept: dict[str, Kept] = {}
        # U and V of a layer are requested one after the other.
        self.factors = functools.lru_cache(maxsize=1)(self._factors)

    def _factors(self, layer: str) -> Factors:
        """Return the factors of a low-rank layer, truncated in float64 and balanced if there is a cut.

        The cores of a deep layer are absorbed into ``U``.

        Returns:
            Factors of the dtype of the checkpoint, or float64 with a cut. ``U`` of a deep layer is float64.
        """
        cores = tuple(self.read(f"{layer}.{name}") for name in core_names(self.layout[layer].depth))
        pair = absorbed(Factors(self.read(f"{layer}.U"), self.read(f"{layer}.V"), cores))
        factors = Factors(pair.U, pair.V)
        if self.cut is None:
            return factors
        try:
            result = truncated(factors, rank=self.cut.rank, energy=self.cut.energy)
        except ValueError as error:
            raise UserError(f"{layer} cannot be truncated: {error}; take an earlier checkpoint") from None
        energies = result.sigma.square()
        rank = result.factors.U.shape[1]
        self.kept[layer] = Kept(rank, float(energies[rank:].sum()), float(energies.sum()))
        return result.factors

    def __call__(self, name: str) -> Tensor:
        """Return a parameter of the dense model.

        Returns:
            The parameter as stored, or the merged weight ``a * W0 + U @ V.T`` of a low-rank layer in float64.
        """
        layer, _, leaf = name.rpartition(".")
        if leaf != "weight" or layer not in self.layout:
            return self.read(name)
        module = self.skeleton.get_submodule(layer)
        kind = kind_of(module)
        assert kind is not None
        factors = self.factors(layer)
        matrix = factors.U.double() @ factors.V.double().T
        if self.layout[layer].base:
            matrix += self.base_scale * self.read(f"{layer}.base").double()
        return kind.restore(module, matrix)
