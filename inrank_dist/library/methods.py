"""Functions that create the settings of each low-rank method."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Literal

from ..lowrank.init import Init
from ..method.settings import Base, LowRankSettings
from ..runtime.errors import UserError, nearest

Targets = str | Sequence[str]


def InRank(
    targets: Targets = "mlp",
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
        targets: the layers to factor, one target or several. ``mlp`` and ``attention`` are the linear layers below
            modules of these names (``attention`` also below ``attn``, ``self_attn``, ``self_attention``, ``cross_attn``
            and ``crossattention``). ``all`` is both, ``inner`` is both except in the first block. Other targets are
            regular expressions that are searched in layer names, so ``.`` selects every linear layer.
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

    Raises:
        UserError: an option is not a setting, or a value is invalid.
    """
    warmup = warmup_steps or (freeze_step if isinstance(freeze_step, int) else 200)
    return _settings(
        targets,
        mode="inrank" if freeze_step is None else "efficient",
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
    targets: Targets = "mlp", *, initial_rank: int = 8, init: Init = "spectral", **options: object
) -> LowRankSettings:
    """Return settings for training with factors of a fixed rank (arXiv 2209.13569).

    Args:
        targets: as in ``InRank``.
        initial_rank: rank of every factored layer.
        init: initialisation of the factors: ``spectral`` (best approximation of a dense initial weight),
            ``spectral_ones`` (its singular vectors, with equal singular values), ``orthogonal``, ``kaiming``, or
            ``loaded`` (best approximation of the weight in ``LowRankRun(initial=...)``).
        options: any other field of ``LowRankSettings``.

    Raises:
        UserError: an option is not a setting, or a value is invalid.
    """
    return _settings(targets, mode="fixed", initial_rank=initial_rank, **{"base": "none", "init": init, **options})


def DeepLoRA(
    targets: Targets = "mlp",
    *,
    initial_rank: int = 8,
    depth: int = 3,
    init_scale: float = 0.1,
    train_only_factors: bool = True,
    **options: object,
) -> LowRankSettings:
    """Return settings for fine-tuning with deep low-rank updates (Deep LoRA, arXiv 2406.04112).

    The weights of ``LowRankRun(initial=...)`` are frozen. Each target gets the update ``U C_k ... C_1 V^T`` with
    ``depth - 2`` square cores.

    Args:
        targets: as in ``InRank``.
        initial_rank: rank of every update.
        depth: number of factors of an update. 2 is LoRA.
        init_scale: scale of the orthogonal factors at initialisation. The singular values of the update start at
            ``init_scale ** depth``, or ``init_scale ** (depth - 2)`` with ``outer_init="gradient"``.
        train_only_factors: whether everything else is frozen. If False, embeddings, norms, biases and layers that are
            not targets are trained, too.
        options: any other field of ``LowRankSettings``. With ``outer_init="gradient"``, call ``run.start(backward)``
            before the first step.

    Raises:
        UserError: an option is not a setting, or a value is invalid.
    """
    chosen: dict[str, object] = {"depth": depth, "init_scale": init_scale, "train_only_factors": train_only_factors}
    fixed: dict[str, object] = {"mode": "fixed", "base": "frozen", "init": "loaded", "initial_rank": initial_rank}
    return _settings(targets, **{**fixed, **chosen, **options})


def PretrainThenFactorise(
    targets: Targets = "mlp", *, steps: int, total_steps: int, initial_rank: int | None = None, **options: object
) -> LowRankSettings:
    """Return settings for dense training followed by factorisation of the weights (arXiv 2209.13569).

    With ``mode="fixed", dense_until="stable_rank"`` the layers are factored once their stable ranks have settled, at
    these ranks (Cuttlefish, arXiv 2305.02538).

    Args:
        targets: as in ``InRank``.
        steps: number of optimizer steps of dense training. With ``dense_until="stable_rank"`` it can end earlier.
        total_steps: number of optimizer steps of the whole run.
        initial_rank: rank of every factored layer. With None, each layer gets the rank that reaches the explained
            ratio.
        options: any other field of ``LowRankSettings``.

    Raises:
        UserError: an option is not a setting, or a value is invalid.
    """
    chosen: dict[str, object] = {"mode": "efficient"}
    if initial_rank is not None:
        chosen = {"mode": "fixed", "initial_rank": initial_rank}
    fixed: dict[str, object] = {"base": "none", "dense_fraction": steps / total_steps}
    method = _settings(targets, **{**fixed, **chosen, **options})
    method.total_steps = total_steps  # type: ignore[misc]
    return method


def Published(targets: Targets = "mlp", *, freeze_step: int = 200, **options: object) -> LowRankSettings:
    """Return settings that reproduce the published code of arXiv 2306.11250.

    Use ``InRank`` for anything else.

    Args:
        targets: as in ``InRank``.
        freeze_step: optimizer step after which the ranks are frozen.
        options: any other field of ``LowRankSettings``; overrides the values of the published code.

    Raises:
        UserError: an option is not a setting, or a value is invalid.
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
    return _settings(targets, **{**fixed, "freeze_step": freeze_step, **options})


def _settings(targets: Targets, **values: object) -> LowRankSettings:
    known = [field.name for field in fields(LowRankSettings)]
    for name in values:
        if name not in known:
            raise UserError(f"a low-rank method has no setting {name!r}{nearest(name, known)}")
    listed = [targets] if isinstance(targets, str) else targets
    if not isinstance(listed, Sequence) or not all(isinstance(target, str) for target in listed):
        raise UserError(f"targets is {targets!r}; write names of layers, such as 'mlp' or ['mlp', 'attention']")
    return LowRankSettings(targets=list(listed), **values)  # type: ignore[arg-type]
