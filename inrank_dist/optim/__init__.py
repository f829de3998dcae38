"""Optimizers: parameter groups, and how what each remembers follows a rank event."""

from .groups import Kind, build_optimizer, decayed_parameters, parameter_kinds
from .matrices import HeldRows
from .moments import map_moments, moment_names, moments_of_right_factor
from .settings import OptimizerSettings

__all__ = [
    "HeldRows",
    "Kind",
    "OptimizerSettings",
    "build_optimizer",
    "decayed_parameters",
    "map_moments",
    "moment_names",
    "moments_of_right_factor",
    "parameter_kinds",
]
