"""The distributed environment of this process, from the variables that its launcher sets."""

import os
from dataclasses import dataclass

from .errors import UserError

OTHER_LAUNCHERS = {
    "SLURM_STEP_NUM_TASKS": "srun",  # not SLURM_NTASKS, which is also set in an allocation's interactive shell
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "MV2_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
}
"""Launchers that do not set ``WORLD_SIZE``, by the variable with their number of processes."""


@dataclass(frozen=True)
class DistributedEnvironment:
    """As set by torchrun and compatible launchers; 0, 1, 0 without a launcher."""

    rank: int
    world_size: int
    local_rank: int


def read_environment() -> DistributedEnvironment:
    """Read ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``.

    Raises:
        UserError: they contradict each other, or an unsupported launcher has started several processes that do not know
            of each other.
    """
    found = DistributedEnvironment(
        integer_variable("RANK", 0), integer_variable("WORLD_SIZE", 1), integer_variable("LOCAL_RANK", 0)
    )
    if not 0 <= found.rank < found.world_size:
        raise UserError(
            f"RANK is {found.rank} but WORLD_SIZE is {found.world_size}; start with torchrun, or unset both for one "
            "process"
        )
    if "WORLD_SIZE" not in os.environ:
        for name, launcher in OTHER_LAUNCHERS.items():
            if (tasks := integer_variable(name, 1)) > 1:
                raise UserError(
                    f"{launcher} started {tasks} tasks but not WORLD_SIZE; write {launcher} torchrun, one task per node"
                )
        if found.local_rank != 0:
            raise UserError(
                f"LOCAL_RANK is {found.local_rank} but WORLD_SIZE is not set; unset LOCAL_RANK for one process, or "
                "start several with launch/torchrun.sh"
            )
    local_world_size = integer_variable("LOCAL_WORLD_SIZE", found.world_size)
    if not 0 <= found.local_rank < local_world_size:
        raise UserError(f"LOCAL_RANK is {found.local_rank}; write 0 to {local_world_size - 1}, or start with torchrun")
    if found.world_size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
            if name not in os.environ:
                raise UserError(f"WORLD_SIZE is {found.world_size} but {name} is not set; start with torchrun")
        if not 0 < integer_variable("MASTER_PORT", 0) < 2**16:
            raise UserError(f"MASTER_PORT is {os.environ['MASTER_PORT']}; write a port from 1 to 65535")
    return found


def logs_for_node() -> bool:
    """Whether this process logs what is the same on all processes of its node (local rank 0 does)."""
    local_rank = os.environ.get("LOCAL_RANK", "0")
    return "WORLD_SIZE" not in os.environ or not local_rank.isdecimal() or int(local_rank) == 0


def integer_variable(name: str, default: int) -> int:
    """Read an integer from an environment variable.

    Raises:
        UserError: the value is not an integer.
    """
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(f"the environment variable {name} is {text!r}; write a whole number") from None
