"""``inrank inspect``: the rank and size of each layer."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from ..lowrank.cores import absorbed
from ..lowrank.criterion import effective_rank
from ..lowrank.layer import LowRankLayer
from ..lowrank.spectrum import Factors, gram_matrices, singular_values
from ..runtime.errors import UserError
from ..runtime.progress import counted
from ..train.monitors.jsonl import read_metrics
from ..train.monitors.ranks import RankTable
from ..train.monitors.text import fixed
from .common import add_run_arguments, console, load_trained, no_overrides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--run DIR [--step N]``."""
    add_run_arguments(parser)


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Print a table of the low-rank layers and the size of the model.

    ``found`` is the rank that the rule chose at the last decision, and ``explained`` the share of the spectrum that the
    rank kept explained there. ``eff. rank`` is the effective rank of ``U V^T`` in the checkpoint. The last column flags
    ranks that are not findings: equal to the null rank, never raised above ``lowrank.initial_rank``, or below the
    threshold.
    """
    no_overrides(rest)
    trained = load_trained(arguments)
    state, settings = trained.checkpoint.state, trained.config.lowrank
    null_rank_of = trained.null_ranks()
    ranks = RankTable()
    ranks.initial_rank, ranks.threshold = settings.start_rank, settings.threshold
    ranks.shrinks = state.ranks["frozen"] and settings.shrinks
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("layer")
    for heading in ("shape", "rank", "found", "modes", "null rank", "explained", "eff. rank", "parameters", "of dense"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for name, layer in counted(state.layout.items(), "measuring the spectra", unit="layers"):
        module = trained.model.get_submodule(name)
        assert isinstance(module, LowRankLayer)
        shape = module.shape
        factors = Factors(module.U, module.V, tuple(module.cores))
        grams = gram_matrices({name: absorbed(factors)}, lambda total: None)
        sigma = singular_values(grams[name])
        null_rank = null_rank_of(shape)
        found, reached = state.ranks["found"].get(name), state.ranks["explained"].get(name)
        ranks.set_layer(
            name,
            rank=layer.rank,
            found=found,
            null_rank=null_rank,
            reached=reached,
            limit=settings.limit(min(shape), layer.rank, found or layer.rank, reached),
        )
        parts = [module.U, module.V, *module.cores, *([] if module.base is None else [module.base])]
        parameters = sum(part.numel() for part in parts)
        table.add_row(
            name,
            f"{shape[0]} x {shape[1]}",
            str(layer.rank),
            fixed(found, 0),
            str(layer.modes),
            fixed(null_rank, 0),
            fixed(ranks.explained.get(name), 3),
            f"{effective_rank(sigma):.1f}",
            str(parameters),
            f"{parameters / (shape[0] * shape[1]):.0%}",
            ", ".join(ranks.flags(name)),
        )
    screen = console(width=160)
    dense = sum(parameter.numel() for parameter in trained.skeleton.parameters())
    now = sum(parameter.numel() for parameter in trained.model.parameters())
    screen.print(
        f"{arguments.run}, step {state.step}, {state.tokens} tokens, lowrank.mode {settings.mode}", highlight=False
    )
    if state.layout:
        screen.print(table)
        decision = _last_decision(trained.checkpoint.run_folder, state.step)
        at = "" if decision is None else f", step {decision}"
        screen.print(
            f"found and explained: at the last decision on rank{at}; eff. rank: of U V^T at step {state.step}",
            highlight=False,
        )
    screen.print(f"{now} parameters, {now / dense:.1%} of {dense} dense", highlight=False)
    for note in ranks.notes():
        screen.print(note, highlight=False)


def _last_decision(run_folder: Path, step: int) -> int | None:
    """Return the step of the last rank decision up to ``step``; None without one, or if no records can be read."""
    try:
        records = read_metrics(run_folder / "metrics.jsonl")
    except UserError:  # the model does not depend on them
        return None
    steps = [record["step"] for record in records if record.get("kind") in ("rank_check", "rank_event")]
    return max((each for each in steps if each <= step), default=None)
