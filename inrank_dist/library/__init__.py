"""Low-rank training for any model in your own training loop."""

from .methods import DeepLoRA, FixedRank, InRank, PretrainThenFactorise, Published
from .run import LowRankRun

__all__ = ["DeepLoRA", "FixedRank", "InRank", "LowRankRun", "PretrainThenFactorise", "Published"]
