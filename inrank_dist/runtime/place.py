"""Where this process stands among those of its job, as its launcher has written it into the environment."""

import os
from dataclasses import dataclass

from .errors import UserError

OTHER_LAUNCHERS = {
    "SLURM_STEP_NUM_TASKS": "srun",  # of the step; SLURM_NTASKS is of the allocation, also in its interactive shell
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "MV2_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
}
"""Number of processes, as launchers tell it that do not set ``WORLD_SIZE``; the launcher."""


@dataclass(frozen=True)
class Place:
    """As torchrun and its kin set it; 0, 1, 0 without a launcher."""

    rank: int
    world_size: int
    local_rank: int


def read_place() -> Place:
    """From ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``.

    Raises:
        UserError: they contradict each other, or something else has started several processes that know nothing of
            each other.
    """
    place = Place(whole_number("RANK", 0), whole_number("WORLD_SIZE", 1), whole_number("LOCAL_RANK", 0))
    if not 0 <= place.rank < place.world_size:
        raise UserError(
            f"RANK is {place.rank} but WORLD_SIZE is {place.world_size}; start with torchrun, or unset both for one "
            "process"
        )
    if "WORLD_SIZE" not in os.environ:
        for name, launcher in OTHER_LAUNCHERS.items():
            if (tasks := whole_number(name, 1)) > 1:
                raise UserError(
                    f"{launcher} started {tasks} tasks but not WORLD_SIZE; write {launcher} torchrun, one task per node"
                )
        if place.local_rank != 0:
            raise UserError(
                f"LOCAL_RANK is {place.local_rank} but WORLD_SIZE is not set; unset LOCAL_RANK for one process, or "
                "start several with launch/torchrun.sh"
            )
    here = whole_number("LOCAL_WORLD_SIZE", place.world_size)
    if not 0 <= place.local_rank < here:
        raise UserError(f"LOCAL_RANK is {place.local_rank}; write 0 to {here - 1}, or start with torchrun")
    if place.world_size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
            if name not in os.environ:
                raise UserError(f"WORLD_SIZE is {place.world_size} but {name} is not set; start with torchrun")
        if not 0 < whole_number("MASTER_PORT", 0) < 2**16:
            raise UserError(f"MASTER_PORT is {os.environ['MASTER_PORT']}; write a port from 1 to 65535")
    return place


def speaks() -> bool:
    """Whether this process tells what all processes of its node find alike: the first one does."""
    local_rank = os.environ.get("LOCAL_RANK", "0")
    return "WORLD_SIZE" not in os.environ or not local_rank.isdecimal() or int(local_rank) == 0


def whole_number(name: str, default: int) -> int:
    """An environment variable.

    Raises:
        UserError: it is no whole number.
    """
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(f"the environment variable {name} is {text!r}; it must be a whole number") from None
