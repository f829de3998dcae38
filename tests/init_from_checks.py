"""What test_init_from_processes.py does in each process."""

from typing import Any
from unittest import mock

import torch
from runs import trainer_of
from torch import Tensor

from inrank_dist.config import Config
from inrank_dist.method import initial
from inrank_dist.runtime.context import Context
from inrank_dist.runtime.errors import UserError
from inrank_dist.train.checkpoint import folder


class Counted:
    """Calls a function and counts."""

    def __init__(self, function: Any) -> None:
        self.function, self.count = function, 0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.count += 1
        return self.function(*arguments, **named)


def start(config: Config, fails: dict[int, str] | None = None) -> dict[str, Any]:
    """Build a trainer.

    Args:
        config: the configuration.
        fails: process rank -> error of its first SVD, as on a host with a bad disk.

    Returns:
        This process's rows of the factors, the ranks, the numbers of SVDs and of hashed files, or the error.
    """
    context = Context()
    context.start(60, always=config.parallel.resolve(context.world_size) != "local")
    svd, hashing = Counted(initial.truncated_weight), Counted(folder.hash_file)
    if fails and context.rank in fails:
        svd.function = mock.Mock(side_effect=ValueError(fails[context.rank]))
    try:
        with mock.patch.object(initial, "truncated_weight", svd), mock.patch.object(folder, "hash_file", hashing):
            trainer = trainer_of(config, context)
        rows: dict[str, Tensor] = {
            name: tensor.clone() for name, tensor in trainer.engine._rows()[0].items() if name.endswith((".U", ".V"))
        }
        table = {name: layer.rank for name, layer in trainer.engine.layout.items()}
        return {"rows": rows, "table": table, "svds": svd.count, "hashed": hashing.count}
    except UserError as error:
        return {"error": str(error), "svds": svd.count, "hashed": hashing.count}
    finally:
        trainer = None
        context.stop()


def whole(results: list[dict[str, Any]], name: str) -> Tensor:
    """A factor, from the rows of all processes."""
    return torch.cat([result["rows"][name] for result in results])


def start_with_own_folder(config: Config) -> dict[str, Any]:
    """``start`` from a folder with the process rank in its name."""
    assert config.model.init_from is not None
    config.model.init_from = config.model.init_from.format(rank=Context().rank)
    return start(config)
