"""InRank for any model: convert it, grow it in your own training loop, merge it back."""

from .methods import FixedRank, InRank, PretrainThenFactorise, Published
from .run import LowRankRun

__all__ = ["FixedRank", "InRank", "LowRankRun", "PretrainThenFactorise", "Published"]
