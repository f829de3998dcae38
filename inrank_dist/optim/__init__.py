"""Optimizers, their parameter groups, and how their state is mapped at a rank event."""

from .groups import Role, build_optimizer, decayed_parameters, parameter_roles
from .matrices import HeldRows
from .moments import map_moments, moment_names, moments_of_right_factor
from .settings import OptimizerSettings

__all__ = [
    "HeldRows",
    "OptimizerSettings",
    "Role",
    "build_optimizer",
    "decayed_parameters",
    "map_moments",
    "moment_names",
    "moments_of_right_factor",
    "parameter_roles",
]
