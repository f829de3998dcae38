"""Low-rank training for any model in your own training loop."""

from .methods import FixedRank, InRank, PretrainThenFactorise, Published
from .run import LowRankRun

__all__ = ["FixedRank", "InRank", "LowRankRun", "PretrainThenFactorise", "Published"]
