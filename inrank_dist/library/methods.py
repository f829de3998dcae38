"""The methods by name, as settings with the arguments that each of them takes."""

from collections.abc import Sequence
from typing import Literal

from ..lowrank.init import Init
from ..method.settings import Base, LowRankSettings


def InRank(
    targets: Sequence[str] = ("mlp",),
    *,
    initial_rank: int = 8,
    buffer: int = 8,
    threshold: float = 0.9,
    interval: int = 25,
    freeze_step: int | Literal["auto"] | None = None,
    base: Base = "decay",
    warmup_steps: int | None = None,
    **options: object,
) -> LowRankSettings:
    """Incremental low-rank learning (arXiv 2306.11250): the rank grows by the explained ratio.

    Args:
        targets: layers to factor: ``mlp``, ``attention``, ``all``, ``inner`` (all but the first block), or regular
            expressions that are searched in module names.
        initial_rank: active rank of each layer at initialisation.
        buffer: modes trained beyond the active rank; the most that one check can add.
        threshold: explained ratio below which the rank is raised.
        interval: optimizer steps between two checks.
        freeze_step: optimizer step after which the ranks are frozen; ``auto``: when no layer has grown for a while;
            None: they may grow to the end.
        base: dense base under the factors: ``decay``, ``frozen`` or ``none``.
        warmup_steps: optimizer steps over which a decaying base fades; None: ``freeze_step``, or 200.
        options: any other field of ``LowRankSettings``.
    """
    warmup = warmup_steps or (freeze_step if isinstance(freeze_step, int) else 200)
    return _settings(
        mode="inrank" if freeze_step is None else "efficient",
        targets=list(targets),
        initial_rank=initial_rank,
        buffer=buffer,
        threshold=threshold,
        interval=interval,
        freeze_step=freeze_step,
        base=base,
        warmup_steps=warmup,
        **options,
    )


def FixedRank(
    rank: int, targets: Sequence[str] = ("mlp",), *, init: Init = "spectral", **options: object
) -> LowRankSettings:
    """Factors of constant rank in place of the weights (arXiv 2209.13569).

    Args:
        rank: of every layer.
        targets: as for ``InRank``.
        init: ``spectral`` (best approximation of a dense start), ``spectral_ones``, ``orthogonal`` or ``kaiming``.
        options: any other field of ``LowRankSettings``.
    """
    return _settings(mode="fixed", targets=list(targets), initial_rank=rank, base="none", init=init, **options)


def PretrainThenFactorise(
    steps: int, total_steps: int, targets: Sequence[str] = ("mlp",), *, rank: int | None = None, **options: object
) -> LowRankSettings:
    """Dense training, then factors of its weights (Cuttlefish, arXiv 2305.02538).

    Args:
        steps: optimizer steps of dense training.
        total_steps: optimizer steps of the whole run.
        targets: as for ``InRank``.
        rank: of every layer; None: what the explained ratio finds in each.
        options: any other field of ``LowRankSettings``.
    """
    chosen: dict[str, object] = {"mode": "efficient"} if rank is None else {"mode": "fixed", "initial_rank": rank}
    method = _settings(targets=list(targets), base="none", dense_fraction=steps / total_steps, **chosen, **options)
    method.total_steps = total_steps  # type: ignore[misc]
    return method


def Published(targets: Sequence[str] = ("mlp",), *, freeze_step: int = 200, **options: object) -> LowRankSettings:
    """The recipe of the code that was published with arXiv 2306.11250; only to reproduce it.

    Args:
        targets: as for ``InRank``.
        freeze_step: optimizer step after which the ranks are frozen.
        options: any other field of ``LowRankSettings``.
    """
    fixed: dict[str, object] = {
        "mode": "efficient",
        "base": "none",
        "init": "kaiming",
        "criterion": "variance",
        "measure": "product",
        "growth_init": "published",
        "initial_rank": 2,
        "buffer": 100,
        "interval": 25,
        "multiple_of": 1,
    }
    return _settings(targets=list(targets), freeze_step=freeze_step, **{**fixed, **options})


def _settings(**values: object) -> LowRankSettings:
    """Settings from keywords.

    Raises:
        TypeError: a keyword that is no setting.
        ValueError: a value that does not fit.
    """
    return LowRankSettings(**values)  # type: ignore[arg-type]
