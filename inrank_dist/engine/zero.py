"""DeepSpeed ZeRO: moments (stage 1), gradients (2) and parameters (3) divided among all processes.

DeepSpeed cuts flat buffers, not rows, and changes no shape of what it has once taken. So whatever leaves it (a rank
event, a checkpoint) and whatever enters it goes one parameter at a time: whole for a moment, then the rows that this
process is charged with, cut as FSDP2 would cut them. Weights are float32 in every precision; with bf16 they are cast
where they are used (``torch_autocast``), so that nothing is lost on the way to another engine.

Tested with the versions that the extra ``deepspeed`` names. Beyond the public API it calls two things: the linking of
fresh moments at stages 1 and 2, which DeepSpeed itself does at the first step, and the fragments of gradients there.
"""

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

from ..lowrank.convert import Layout
from ..lowrank.spectrum import Factors, gram_matrices
from ..models import LanguageModel
from ..optim import OptimizerSettings, moment_names
from ..runtime.context import Context
from ..runtime.errors import UserError
from .engine import Engine
from .kernels import use_own_builds
from .options import BuildOptions
from .placement import RowPlacement
from .sharded import Rows, Values
from .zero_settings import merge

MOST_IN_A_BUCKET = 50_000_000
"""Elements of a bucket of gradients, unless ``parallel.deepspeed`` says otherwise."""


def load_deepspeed() -> Any:
    """The package ``deepspeed``; imported late, because it takes seconds."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    use_own_builds()
    import deepspeed
    import deepspeed.ops

    # For processes on CPUs DeepSpeed would compile an all-reduce in shared memory, which takes a minute and a compiler
    # and waits without end for the lock of a build that was killed. Only its inference uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Its calls, which the newest torch has other names for.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*` is deprecated", category=FutureWarning)
    return deepspeed


def deepspeed_config(
    stage: int,
    *,
    offload: bool,
    bf16: bool,
    micro_batch_size: int,
    accumulation: int,
    extra: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """DeepSpeed's settings from ours.

    Args:
        stage: of ZeRO.
        offload: keep master weights and moments in the memory of the CPU.
        bf16: compute in bfloat16.
        micro_batch_size, accumulation: sequences of a micro-batch, and micro-batches of a step in one process.
        extra: ``parallel.deepspeed``, which ``zero_settings.check`` has passed.

    Raises:
        UserError: a name or value in ``extra`` that DeepSpeed does not know.
    """
    ours = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,  # the client optimizer clips, as with every engine
        "steps_per_print": sys.maxsize,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu" if offload else "none"}},
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16"},
    }
    # Everything travels in float32 unless asked for.
    config = merge(merge({"torch_autocast": {"lower_precision_safe_modules": []}}, extra or {}), ours)
    deepspeed = load_deepspeed()
    with _told(bool(extra)):
        deepspeed.DeepSpeedConfig(config)
    return config


@contextmanager
def _told(passed_on: bool) -> Iterator[None]:
    """Where settings of the user's were passed on, what DeepSpeed raises is about them: tell it in one line."""
    try:
        yield
    except (ValueError, AssertionError, TypeError, AttributeError, KeyError) as error:
        if not passed_on:
            raise
        told = " ".join(line.strip() for line in str(error).splitlines() if "errors.pydantic.dev" not in line)
        raise UserError(
            f"parallel.deepspeed is refused by DeepSpeed: {told or type(error).__name__}; write what its documentation "
            "names, or leave it out"
        ) from error


class ZeroEngine(Engine):
    """The model in a DeepSpeed engine; every rank event makes another one.

    Args:
        stage: of ZeRO; 0: replicas, as DDP.
        config: from ``deepspeed_config``.
        passed_on: whether settings of the user's are in it, who is told then what DeepSpeed says of them.
    """

    def __init__(
        self,
        skeleton: LanguageModel,
        layout: Layout,
        values: Values | None,
        *,
        context: Context,
        optimizer: OptimizerSettings,
        options: BuildOptions,
        stage: int,
        config: Mapping[str, Any],
        passed_on: bool = False,
    ) -> None:
        self.deepspeed = load_deepspeed()
        self.utils = self.deepspeed.utils
        self.passed_on = passed_on
        os.environ.setdefault("LOCAL_RANK", str(context.local_rank))  # without a launcher; DeepSpeed insists
        self.stage = stage
        self.offload = config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
        mesh = init_device_mesh(context.device.type, (context.world_size,), mesh_dim_names=("shard",))
        self.row_placement = RowPlacement(context.rank, context.world_size, mesh=mesh, placements=(Shard(0),))
        self.config = config
        self._optimizer_kind = self._find_optimizer(context, optimizer, self.offload)
        super().__init__(skeleton, layout, values, context=context, optimizer=optimizer, options=options)
        self.name = f"zero{stage}"

    @property
    def _plain_moments(self) -> tuple[str, ...]:
        return moment_names(self.optimizer_settings, "plain")

    # Building.

    def _parallelize(self, module: nn.Module) -> None:
        if self.stage == 3:
            # A block is gathered as one, not layer by layer: fewer and larger collectives, and layers may run together.
            self.utils.set_z3_leaf_modules(module, list({type(block) for block in self.plan.block_modules(module)}))

    def _find_placements(self, module: nn.Module) -> dict[str, RowPlacement]:
        return {name: self.row_placement for name, _ in module.named_parameters(remove_duplicate=False)}

    def _assign(self, module: nn.Module, rows: Rows) -> None:
        placed: dict[int, nn.Parameter] = {}
        for name, parameter in list(module.named_parameters(remove_duplicate=False)):
            if id(parameter) not in placed:
                whole = self._gather(rows(name, parameter), parameter.shape)
                made = nn.Parameter(whole, requires_grad=parameter.requires_grad)
                if self.stage == 3:
                    # Cut at once, so that no process ever holds the whole model.
                    self.deepspeed.zero.Init(module=nn.ParameterList([made]), config_dict_or_path=self.config)
                placed[id(parameter)] = made
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, placed[id(parameter)])

    def _make_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        kind = self._optimizer_kind
        make = partial(kind, fused=True) if issubclass(kind, torch.optim.AdamW) else kind
        return self._optimizer_of(module, kind=make)

    @staticmethod
    def _find_optimizer(context: Context, settings: OptimizerSettings, offload: bool) -> type["_Gate"]:
        """DeepSpeed's own Adam where its kernel can be had in every process, torch's elsewhere."""
        if settings.name == "sgd":
            return _gated(torch.optim.SGD)
        kind: type[torch.optim.Optimizer] | None = None
        if offload or context.device.type == "cuda":
            from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
            from deepspeed.ops.op_builder import CPUAdamBuilder, FusedAdamBuilder

            builder = CPUAdamBuilder() if offload else FusedAdamBuilder()
            try:
                if builder.is_compatible(verbose=False):
                    builder.load(verbose=False)
                    kind = DeepSpeedCPUAdam if offload else FusedAdam
            except Exception as error:  # whatever a compiler can say
                logging.getLogger("inrank_dist").info("DeepSpeed's Adam kernel cannot be built: %s", error)
        everywhere = all(context.gather(kind is not None))
        return _gated(kind if kind is not None and everywhere else torch.optim.AdamW)

    def _wrap(self, module: nn.Module) -> nn.Module:
        # DeepSpeed would reserve 2 GB for a bucket of gradients, whatever the size of the model.
        trained = sum(self._shape(p).numel() for p in module.parameters() if p.requires_grad)
        buckets = {"zero_optimization": {"reduce_bucket_size": min(trained, MOST_IN_A_BUCKET)}}
        config = merge(buckets, self.config)
        with _told(self.passed_on):
            engine, _, _, _ = self.deepspeed.initialize(model=module, optimizer=self.optimizer, config=config)
        self._make_moments(engine.optimizer)
        return cast(nn.Module, engine)

    def _make_moments(self, zero: Any) -> None:
        """Zero moments for what the client optimizer moves, linked to the parameters.

        DeepSpeed makes and links them at the first step, and forgets all groups of parameters but the first.
        """
        flat: Iterable[Tensor]
        if self.stage == 0:
            flat = [p for group in self.optimizer.param_groups for p in group["params"]]
        elif self.stage == 3:
            flat = zero.fp32_partitioned_groups_flat
        else:
            flat = zero.single_partition_of_fp32_groups
        for each in flat:
            state: dict[str, Any] = {name: torch.zeros_like(each) for name in self._plain_moments}
            if self.optimizer_settings.name == "adamw":
                of_torch, steps = isinstance(self.optimizer, torch.optim.AdamW), self.optimizer_steps
                state["step"] = torch.tensor(float(steps), device=each.device) if of_torch else steps
            self.optimizer.state[each] = state
        if self.stage in (1, 2):
            zero._lazy_init_hp_params_optimizer_state()

    def release(self) -> None:
        cast(Any, self.model).destroy()
        if self.stage == 3:
            _forget_models()
        super().release()

    def check(self) -> None:
        if self.stage == 0:
            return super().check()
        mark = "_z3_optimizer" if self.stage == 3 else "_hp_mapping"
        lost = [name for name, p in self.parameters().items() if p.requires_grad and not hasattr(p, mark)]
        assert not lost, f"DeepSpeed does not hold {lost}"

    # Whole parameters and rows of them.

    def _shape(self, parameter: nn.Parameter) -> torch.Size:
        return cast(torch.Size, getattr(parameter, "ds_shape", parameter.shape))

    def _gather(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """The whole tensor of which each process holds its rows."""
        most = -(-shape[0] // self.context.world_size)
        padded = rows.new_zeros(most, *shape[1:])
        padded[: rows.shape[0]] = rows
        whole = rows.new_empty(most * self.context.world_size, *shape[1:])
        dist.all_gather_into_tensor(whole, padded)
        return whole[: shape[0]].clone() if len(whole) > shape[0] else whole

    def _cut(self, whole: Tensor) -> Tensor:
        """This process's rows, copied."""
        return whole[slice(*self.row_placement.rows(whole.shape[0]))].clone()

    def _part(self, whole: Tensor) -> Tensor:
        """This process's part of a flat tensor as stage 3 cuts it, filled up with zeros."""
        size = -(-whole.numel() // self.context.world_size)
        part = whole.reshape(-1)[self.context.rank * size : (self.context.rank + 1) * size]
        return torch.nn.functional.pad(part, (0, size - part.numel()))

    def _filled(self, parameter: nn.Parameter, part: Tensor) -> Tensor:
        """What of this process's part of a flat tensor is no padding, in which DeepSpeed leaves anything."""
        start = self.context.rank * part.numel()
        return part[: max(self._shape(parameter).numel() - start, 0)]

    def _local(self, tensor: Tensor) -> Tensor:
        """This process's rows, copied; at stage 3 all processes ask together."""
        with self.deepspeed.zero.GatheredParameters([tensor], enabled=self.stage == 3):
            return self._cut(tensor.detach())

    @torch.no_grad()
    def _write(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Overwrite a parameter and its master."""
        with self.deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.stage == 3):
            parameter.data.copy_(whole)
        if not parameter.requires_grad:
            return
        if self.stage == 3:
            self.utils.safe_set_local_fp32_param(parameter, self._part(whole))
        elif self.stage > 0:
            self.utils.safe_set_full_fp32_param(parameter, whole)

    def _moment_names(self, parameter: nn.Parameter) -> tuple[str, ...]:
        return self._plain_moments if self.optimizer_steps and parameter.requires_grad else ()

    def _moment(self, parameter: nn.Parameter, name: str) -> Tensor:
        """This process's rows, copied; all processes ask together."""
        if self.stage == 0:
            return self._cut(self.optimizer.state[parameter][name])
        return self._cut(self.utils.safe_get_full_optimizer_state(parameter, name))

    def _set_state(
        self, name: str, parameter: nn.Parameter, moments: Mapping[str, Tensor], extras: Mapping[str, Any]
    ) -> None:
        self._set_moments(parameter, moments)

    def _set_moments(self, parameter: nn.Parameter, moments: Mapping[str, Tensor]) -> None:
        for name, rows in moments.items():
            whole = self._gather(rows, self._shape(parameter))
            if self.stage == 0:
                self.optimizer.state[parameter][name].copy_(whole)
            elif self.stage == 3:
                self.utils.safe_set_local_optimizer_state(parameter, self._part(whole), name)
            else:
                self.utils.safe_set_full_optimizer_state(parameter, whole, name)

    def restore(self, steps: int, read: Callable[[dict[str, Tensor]], None]) -> None:
        self.optimizer_steps = steps
        names = self._plain_moments if steps else ()
        rows: dict[str, Tensor] = {}
        wrapped: dict[str, Tensor] = {}
        for name, parameter in self.parameters().items():
            shape = self._shape(parameter)
            first, end = self.row_placement.rows(shape[0])
            moments = names if parameter.requires_grad else ()
            for each in (name, *(f"optimizer.{moment}.{name}" for moment in moments)):
                rows[each] = torch.zeros(end - first, *shape[1:], device=self.device)
                wrapped[each] = self.row_placement.wrap(rows[each], shape)
        read(wrapped)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = torch.full_like(state["step"], steps) if torch.is_tensor(state["step"]) else steps
        for name, parameter in self.parameters().items():
            self._write(parameter, self._gather(rows[name], self._shape(parameter)))
            if parameter.requires_grad:
                self._set_moments(parameter, {moment: rows[f"optimizer.{moment}.{name}"] for moment in names})

    def _held(self) -> Iterable[Tensor]:
        names = self._plain_moments
        for parameter in self.parameters().values():
            yield self._filled(parameter, cast(Any, parameter).ds_tensor) if self.stage == 3 else parameter.detach()
            if self.stage == 3 and parameter.requires_grad:
                yield from (
                    self._filled(parameter, self.utils.safe_get_local_optimizer_state(parameter, name))
                    for name in names
                )
        if self.stage < 3:
            for state in self.optimizer.state.values():
                yield from (state[name] for name in names)

    @torch.no_grad()
    def set_columns(self, layer: str, first: int, U: Tensor | float, V: Tensor | float) -> None:
        parameters = self.parameters()
        for factor, columns in (("U", U), ("V", V)):
            parameter = parameters[f"{layer}.{factor}"]
            rows = self._local(parameter)
            rows[:, first:] = columns
            self._write(parameter, self._gather(rows, self._shape(parameter)))

    # Steps.

    def _accumulating(self, last: bool) -> Any:
        cast(Any, self.model).set_gradient_accumulation_boundary(last)
        return super()._accumulating(last)

    def _backward(self, loss: Tensor) -> None:
        cast(Any, self.model).backward(loss, scale_wrt_gas=False)

    def _sum_over_shards(self, tensor: Tensor) -> None:
        if self.stage > 0:
            dist.all_reduce(tensor)

    def _gradients(self) -> list[Tensor]:
        """What this process holds of the combined gradient."""
        self._await_gradients()
        trained = [p for p in self.parameters().values() if p.requires_grad]
        if self.stage == 0:
            return [p.grad for p in trained if p.grad is not None]
        if self.stage == 3:
            return [self._filled(p, self.utils.safe_get_local_grad(p)) for p in trained]
        held = [p for p in trained if p._hp_mapping is not None]  # type: ignore[attr-defined]
        found = [p._hp_mapping.get_lp_grad_fragment(p._index_in_param_group) for p in held]  # type: ignore[attr-defined]
        return found or [torch.zeros(1, device=self.device)]

    def _await_gradients(self) -> None:
        """With offload, ZeRO-2 is still copying them to the CPU."""
        if self.offload and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        self._await_gradients()
        return self._cut(self.utils.safe_get_full_grad(parameter))

    def _move(self, scale: Tensor | None) -> None:
        gate = cast(_Gate, self.optimizer)
        gate.scale = scale
        cast(Any, self.model).step()
        gate.scale = None

    def drop_gradients(self) -> None:
        """A step of DeepSpeed in which the client optimizer stands still."""
        gate = cast(_Gate, self.optimizer)
        gate.held = True
        cast(Any, self.model).step()
        gate.held = False

    def _decay_products(self, rate: float) -> None:
        """As ``Engine._decay_products``, on whole factors, one layer at a time."""
        parameters = self.parameters()
        for layer in self.layout:
            pair = [parameters[f"{layer}.{factor}"] for factor in "UV"]
            with self.deepspeed.zero.GatheredParameters(pair, enabled=self.stage == 3):
                U, V = (parameter.detach().clone() for parameter in pair)
            gram = gram_matrices({layer: Factors(U, V)}, lambda tensor: None)[layer]
            self._write(pair[0], U - rate * (U @ gram.V.to(U.dtype)))
            self._write(pair[1], V - rate * (V @ gram.U.to(V.dtype)))

    def facts(self) -> dict[str, str]:
        from deepspeed.accelerator import get_accelerator

        kind = self._optimizer_kind.__bases__[1]
        return {
            "deepspeed": self.deepspeed.__version__,
            "accelerator": get_accelerator().device_name(),
            "backend": dist.get_backend(),
            "optimizer": f"{kind.__module__.partition('.')[0]} {kind.__name__}{' on cpu' if self.offload else ''}",
        }


def _forget_models() -> None:
    """Empty what ZeRO-3 keeps beside its engines, which would hold every model that there ever was: a stack of the
    modules that are in their forward pass, whose first one stays on it, and a cache that knows its arguments."""
    importlib.import_module("deepspeed.runtime.zero.parameter_offload").FWD_MODULE_STACK.clear()
    coordinator = importlib.import_module("deepspeed.runtime.zero.partitioned_param_coordinator")
    for method in vars(coordinator.PartitionedParameterCoordinator).values():
        wrapped = [cell.cell_contents for cell in getattr(method, "__closure__", None) or ()]  # below a decorator
        for each in (method, *wrapped):
            if hasattr(each, "cache_clear"):
                each.cache_clear()


class _Gate(torch.optim.Optimizer):
    """The client optimizer as DeepSpeed calls it: it clips, and stands still where a step must not be taken.

    Attributes:
        scale: factor of all gradients; None: 1.
        held: do nothing.
    """

    scale: Tensor | None = None
    held = False
    opt_id: int

    def step(self, closure: Any = None) -> Any:
        if self.held:
            return None
        if self.scale is not None:
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, self.scale.to(gradients[0].device))
        if hasattr(self, "ds_opt_adam"):
            # DeepSpeedCPUAdam multiplies the powers of the betas up; a resumed run computes them anew. So forget them.
            group = self.param_groups[0]
            betas, eps, decay = group["betas"], group["eps"], group["weight_decay"]
            self.ds_opt_adam.create_adam(self.opt_id, group["lr"], *betas, eps, decay, True, False)
        return super().step(closure)


def _gated(kind: type[torch.optim.Optimizer]) -> type[_Gate]:
    return type(f"Gated{kind.__name__}", (_Gate, kind), {})
