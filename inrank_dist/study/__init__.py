"""Many runs of one config, compared: variants with their controls, seeds, rates tuned alike, one table."""

from .results import Comparison, compare
from .settings import Study, Variant, read_study
from .work import Worker

__all__ = ["Comparison", "Study", "Variant", "Worker", "compare", "read_study"]
