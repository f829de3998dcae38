"""Construction of a trainer from a configuration."""

from collections.abc import Callable, Sequence

from ..config import Config
from ..data import Loader, LoaderState, Prefetcher, Prepared
from ..lowrank.convert import convert
from ..method.controller import RankController
from ..method.initial import StartValues, fits, layer_shapes, start_layout, target_shapes
from ..runtime.context import Context
from ..runtime.errors import UserError
from ..runtime.stop import StopRequest
from .arithmetic import FlopCounter
from .building import build_engine, dense_skeleton
from .callbacks import Callback, Sample
from .checkpoint import Checkpoint, CheckpointWriter, load_tensors
from .health import Health
from .init_from import initial_values
from .loop import Trainer
from .profiling import StepProfiler
from .records import Records
from .separation import refuse_leaks
from .speed import known_peak
from .updates import SpectrumTracker


def build(
    config: Config,
    context: Context,
    data: Prepared,
    checkpoint: Checkpoint | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    stop: StopRequest | None = None,
    heartbeat: Callable[..., None] = lambda *activity: None,
    before_save: Callable[[], None] = lambda: None,
) -> Trainer:
    """Build a trainer for a new run, or for a run that resumes from a checkpoint.

    Args:
        config: the configuration.
        context: context with an initialised process group.
        data: the prepared data, from ``inrank_dist.data.prepare``.
        checkpoint: the checkpoint to resume from, or None.
        callbacks: additional callbacks, called before the built-in ones.
        stop, heartbeat, before_save: as in ``Trainer``.

    Raises:
        UserError: if the settings do not fit the model, the data, the checkpoint or the number of processes.
        ValueError: if two callbacks have the same name.
    """
    saved = checkpoint.state if checkpoint else None
    loader = Loader(
        data,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        rank=context.rank,
        world_size=context.world_size,
        seed=config.run.seed,
        state=LoaderState.from_dict(saved.loader) if saved else None,
    )
    skeleton = dense_skeleton(config.model, data.tokenizer.vocab_size, data.tokenizer.eos_id, config.lowrank)
    shapes = layer_shapes(skeleton, config.lowrank)
    # A run that resumes does not read what it was loaded from.
    if saved:
        dense_values = skeleton.initial_values(config.run.seed)
    else:
        dense_values = initial_values(config, skeleton, data.tokenizer, context)
    values = StartValues(dense_values, shapes, config.lowrank, config.run.seed)
    if not saved:
        values.cut_loaded(context)
    layout = saved.layout if saved else start_layout(shapes, config.lowrank, values.ranks)
    if not fits(layout, shapes, config.lowrank):
        first = sorted(layout.keys() ^ shapes.keys())[0]
        raise UserError(
            f"the checkpoint has {len(layout)} low-rank layers; lowrank.mode {config.lowrank.mode}, targets "
            f"{config.lowrank.targets} makes {len(shapes)}, and {first} is in one of them only; write those it was "
            "trained with, or another run.dir"
        )
    if config.lowrank.initial_energy is not None:
        values.ranks = {name: layer.rank for name, layer in layout.items()}
    start = start_layout(shapes, config.lowrank, values.ranks)
    engine = build_engine(config, context, skeleton, layout, None if saved else values)
    ranks = RankController(engine, values, config.lowrank, config.run.seed, config.train.steps)
    health = Health(context, config.train, config.optimizer.lr)
    peak = known_peak(context.device, bf16=config.train.precision == "bf16", tflops=config.train.peak_tflops)
    dense, at_start = (sum(p.numel() for p in model.parameters()) for model in (skeleton, convert(skeleton, start)))
    every = [*callbacks, Sample(), Records(peak, dense, at_start)]
    measured = ((config.lowrank.track_updates, dense_values), (config.lowrank.track_weights, None))
    for interval, initial in measured:
        if interval:
            every.append(SpectrumTracker(interval, target_shapes(skeleton, config.lowrank), initial, config.run.seed))
    names = [callback.name for callback in every if callback.name]
    if len(names) > len(set(names)):
        raise ValueError(f"two callbacks have the same name, under which their state is saved: {sorted(names)}")
    if checkpoint and saved:
        load_tensors(checkpoint.folder, saved, engine)
        ranks.load_state_dict(saved.ranks)
        health.load_state_dict(saved.health)
        for callback in every:
            if callback.name in saved.callbacks:
                callback.load_state_dict(saved.callbacks[callback.name])
    if config.model.name == "hf" and config.model.mask_documents:
        refuse_leaks(
            engine,
            data.tokenizer.eos_id,
            batch_size=config.train.micro_batch_size,
            seq_len=data.block_length,
            vocab_size=data.tokenizer.vocab_size,
        )
    companions = {"config.yaml": config.to_yaml().encode(), "tokenizer.model": data.tokenizer.model}
    return Trainer(
        config,
        context,
        data,
        loader=Prefetcher(loader, pin=context.device.type == "cuda"),
        engine=engine,
        ranks=ranks,
        health=health,
        writer=CheckpointWriter(config.run.folder, context, config.checkpoint, companions),
        profiler=StepProfiler(config.train.profile, config.run.folder / "profile", context),
        flops=FlopCounter(engine, data.block_length, saved.flops if saved else 0),
        callbacks=every,
        state=saved,
        branched_from=checkpoint.run_folder if checkpoint and not checkpoint.is_in(config.run.folder) else None,
        stop=stop or StopRequest(),
        heartbeat=heartbeat,
        before_save=before_save,
    )
