"""Studies: runs of variants of one config, each with its control, over several seeds, compared in one table."""

from .results import Comparison, compare
from .settings import Study, Variant, read_study
from .work import Worker

__all__ = ["Comparison", "Study", "Variant", "Worker", "compare", "read_study"]
