"""Construction of the dense model and the engine from the configuration."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..config import Config
from ..data import check_batch_sizes
from ..engine.cost import Setup
from ..engine.engine import Engine
from ..engine.options import BuildOptions
from ..engine.reshapable import Values
from ..engine.settings import zero_stage
from ..lowrank.convert import Layout, freeze_rest
from ..method.initial import layer_shapes
from ..method.settings import LowRankSettings
from ..models import LanguageModel, ModelSettings, build_model
from ..runtime.context import Context
from ..runtime.progress import phase


def dense_skeleton(
    settings: ModelSettings,
    vocab_size: int,
    separator_id: int | None = None,
    lowrank: LowRankSettings | None = None,
) -> LanguageModel:
    """Build the dense model on ``meta``, for its names and shapes and for which of its parameters are trained.

    Args:
        settings: the settings of the model.
        vocab_size: vocabulary size of the tokenizer.
        lowrank: settings of the factored layers. Without them all parameters are trained.
        separator_id: id of the token that separates documents. The model does not run without it if the settings
            separate documents.
    """
    with torch.device("meta"):
        model = build_model(settings, settings.padded(vocab_size), separator_id)
    if lowrank and lowrank.mode != "full" and lowrank.train_only_factors:
        freeze_rest(model, layer_shapes(model, lowrank))
    return model


def build_engine(
    config: Config, context: Context, skeleton: LanguageModel, layout: Layout, values: Values | None
) -> Engine:
    """Build the engine selected by ``parallel.engine``.

    Args:
        config: the configuration.
        context: context with an initialised process group (``context.start``).
        skeleton: the dense model on ``meta``.
        layout: layout of the low-rank layers.
        values: initial values, or None if a checkpoint is loaded afterwards.
    """
    options = BuildOptions(
        bf16=config.train.precision == "bf16",
        compile=config.train.compile,
        cuda_graph=config.train.cuda_graph,
        fuse=config.lowrank.fuse,
        activation=config.lowrank.activation,
        activation_checkpointing=config.train.activation_checkpointing,
        grad_clip=config.train.grad_clip,
        frobenius_decay=config.lowrank.frobenius_decay,
        frobenius_in_loss=config.lowrank.frobenius_in_loss,
        outer_lr_scale=config.lowrank.outer_lr_scale,
        reduce_each_micro_batch=config.parallel.reduce_each_micro_batch,
    )
    name = config.parallel.resolve(context.world_size)
    if name == "local" or name == "ddp" or name == "fsdp":
        make: Callable[..., Engine] = functools.partial(Engine, name=name, shard_size=config.parallel.shard_size)
    else:
        make = _zero(zero_stage(name), config, context)
    with phase("building the model", enabled=context.is_main):
        return make(skeleton, layout, values, context=context, optimizer=config.optimizer, options=options)


def cost_setup(config: Config, world_size: int) -> Setup:
    """Return the inputs of the formulas in ``engine.cost``, except the model.

    Raises:
        UserError: if the batch sizes or the engine do not fit the number of processes.
    """
    train = config.train
    check_batch_sizes(train.global_batch_size, train.micro_batch_size, world_size)
    return Setup(
        config.parallel.resolve(world_size),
        world_size,
        config.parallel.shard_size,
        config.optimizer,
        train.global_batch_size // world_size // train.micro_batch_size,
        train.precision == "bf16",
        config.parallel.offload_optimizer,
        config.parallel.reduce_each_micro_batch,
    )


def _zero(stage: int, config: Config, context: Context) -> Callable[..., Engine]:
    from ..engine.zero import ZeroEngine

    settings, passed_on = zero_config(stage, config, context.world_size), bool(config.parallel.deepspeed)
    return functools.partial(ZeroEngine, stage=stage, config=settings, passed_on=passed_on)


def zero_config(stage: int, config: Config, world_size: int) -> dict[str, Any]:
    """Return the configuration for DeepSpeed.

    Raises:
        UserError: if ``parallel.deepspeed`` contains something that DeepSpeed does not know.
    """
    from ..engine.zero_config import deepspeed_config  # DeepSpeed is optional and slow to import

    return deepspeed_config(
        stage,
        offload=config.parallel.offload_optimizer,
        bf16=config.train.precision == "bf16",
        micro_batch_size=config.train.micro_batch_size,
        accumulation=cost_setup(config, world_size).accumulation,
        extra=config.parallel.deepspeed,
    )
