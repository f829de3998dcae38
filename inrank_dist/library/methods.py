"""Functions that create the settings of each low-rank method."""

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
    """Return settings for incremental low-rank learning (InRank, arXiv 2306.11250).

    The rank of each layer grows until the active modes reach a given explained ratio.

    Args:
        targets: the layers to factor: ``mlp``, ``attention``, ``all``, ``inner`` (all except those of the first block),
            or regular expressions searched in module names.
        initial_rank: active rank of each layer at initialisation.
        buffer: number of modes trained beyond the active rank. A check adds at most this many modes.
        threshold: the rank grows if the explained ratio is below this value.
        interval: number of optimizer steps between checks.
        freeze_step: optimizer step after which the ranks are frozen. ``"auto"`` freezes them once no layer has grown
            for ``freeze_patience`` checks, or after ``freeze_fraction`` of the run. With None they can grow until the
            end of training.
        base: dense base weight added to the product of the factors: ``decay`` (fades to zero), ``frozen`` or ``none``.
            To fine-tune ``LowRankRun(initial=...)``, write ``frozen`` and ``init="loaded"``.
        warmup_steps: number of optimizer steps over which a decaying base fades. Defaults to ``freeze_step`` if that is
            a number, otherwise 200.
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
    """Return settings for training with factors of a fixed rank (arXiv 2209.13569).

    Args:
        rank: rank of every factored layer.
        targets: as in ``InRank``.
        init: initialisation of the factors: ``spectral`` (best approximation of a dense initial weight),
            ``spectral_ones`` (its singular vectors, with equal singular values), ``orthogonal``, ``kaiming``, or
            ``loaded`` (best approximation of the weight in ``LowRankRun(initial=...)``).
        options: any other field of ``LowRankSettings``.
    """
    return _settings(mode="fixed", targets=list(targets), initial_rank=rank, base="none", init=init, **options)


def DeepLoRA(
    rank: int, targets: Sequence[str] = ("mlp",), *, depth: int = 3, init_scale: float = 0.1, **options: object
) -> LowRankSettings:
    """Return settings for fine-tuning with deep low-rank updates (Deep LoRA, arXiv 2406.04112).

    The weights of ``LowRankRun(initial=...)`` are frozen. Each gets the update ``U C_k ... C_1 V^T`` with
    ``depth - 2`` square cores.

    Args:
        rank: rank of every update.
        targets: as in ``InRank``.
        depth: number of factors of an update. 2 is LoRA.
        init_scale: scale of the orthogonal factors at initialisation. The update starts at ``init_scale ** depth``.
        options: any other field of ``LowRankSettings``. With ``outer_init="gradient"``, call ``run.start(backward)``
            before the first step.
    """
    fixed: dict[str, object] = {"mode": "fixed", "base": "frozen", "init": "loaded", "initial_rank": rank}
    return _settings(targets=list(targets), depth=depth, init_scale=init_scale, **fixed, **options)


def PretrainThenFactorise(
    steps: int, total_steps: int, targets: Sequence[str] = ("mlp",), *, rank: int | None = None, **options: object
) -> LowRankSettings:
    """Return settings for dense training followed by factorisation of the weights (arXiv 2209.13569).

    With ``mode="fixed", dense_until="stable_rank"`` the layers are factored once their stable ranks have settled, at
    these ranks (Cuttlefish, arXiv 2305.02538).

    Args:
        steps: number of optimizer steps of dense training; the largest with ``dense_until="stable_rank"``.
        total_steps: number of optimizer steps of the whole run.
        targets: as in ``InRank``.
        rank: rank of every factored layer. With None, each layer gets the rank that reaches the explained ratio.
        options: any other field of ``LowRankSettings``.
    """
    chosen: dict[str, object] = {"mode": "efficient"} if rank is None else {"mode": "fixed", "initial_rank": rank}
    fixed: dict[str, object] = {"base": "none", "dense_fraction": steps / total_steps}
    method = _settings(targets=list(targets), **{**fixed, **chosen, **options})
    method.total_steps = total_steps  # type: ignore[misc]
    return method


def Published(targets: Sequence[str] = ("mlp",), *, freeze_step: int = 200, **options: object) -> LowRankSettings:
    """Return settings that reproduce the published code of arXiv 2306.11250.

    Use ``InRank`` for anything else.

    Args:
        targets: as in ``InRank``.
        freeze_step: optimizer step after which the ranks are frozen.
        options: any other field of ``LowRankSettings``; overrides the values of the published code.
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
    """Create settings from keyword arguments.

    Raises:
        TypeError: if a keyword is not a setting.
        ValueError: if a value is invalid.
    """
    return LowRankSettings(**values)  # type: ignore[arg-type]
