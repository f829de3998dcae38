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
from collections.abc import Iterable, Mapping
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
from ..optim import OptimizerSettings
from ..runtime.context import Context
from .options import BuildOptions
from .placement import RowPlacement
from .reshapable import Values
from .zero_config import MOST_IN_A_BUCKET, explained, load_deepspeed
from .zero_rows import ZeroRows
from .zero_settings import merge


class ZeroEngine(ZeroRows):
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
        self._optimizer_class = self._find_optimizer(context, optimizer, self.offload)
        super().__init__(skeleton, layout, values, context=context, optimizer=optimizer, options=options)
        self.name = f"zero{stage}"

    # Building.

    def _parallelize(self, module: nn.Module) -> None:
        if self.stage == 3:
            # A block is gathered as one, not layer by layer: fewer and larger collectives, and layers may run together.
            self.utils.set_z3_leaf_modules(module, list({type(block) for block in self.plan.block_modules(module)}))

    def _make_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        cls = self._optimizer_class
        make = partial(cls, fused=True) if issubclass(cls, torch.optim.AdamW) else cls
        return self._optimizer_of(module, elementwise=make)

    @staticmethod
    def _find_optimizer(context: Context, settings: OptimizerSettings, offload: bool) -> type["_Gate"]:
        """DeepSpeed's own Adam where its kernel can be had in every process, torch's elsewhere."""
        elementwise = settings.entry.elementwise
        if elementwise is not torch.optim.AdamW:
            return _gated(elementwise)
        found: type[torch.optim.Optimizer] | None = None
        if offload or context.device.type == "cuda":
            from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
            from deepspeed.ops.op_builder import CPUAdamBuilder, FusedAdamBuilder

            builder = CPUAdamBuilder() if offload else FusedAdamBuilder()
            try:
                if builder.is_compatible(verbose=False):
                    builder.load(verbose=False)
                    found = DeepSpeedCPUAdam if offload else FusedAdam
            except Exception as error:  # whatever a compiler can say
                logging.getLogger("inrank_dist").info("DeepSpeed's Adam kernel cannot be built: %s", error)
        everywhere = all(context.gather(found is not None))
        return _gated(found if found is not None and everywhere else torch.optim.AdamW)

    def _wrap(self, module: nn.Module) -> nn.Module:
        # DeepSpeed would reserve 2 GB for a bucket of gradients, whatever the size of the model.
        trained = sum(self._shape(p).numel() for p in module.parameters() if p.requires_grad)
        buckets = {"zero_optimization": {"reduce_bucket_size": min(trained, MOST_IN_A_BUCKET)}}
        config = merge(buckets, self.config)
        with explained(self.passed_on):
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
            if "exp_avg" in state:
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

        cls = self._optimizer_class.__bases__[1]
        return {
            "deepspeed": self.deepspeed.__version__,
            "accelerator": get_accelerator().device_name(),
            "backend": dist.get_backend(),
            "optimizer": f"{cls.__module__.partition('.')[0]} {cls.__name__}{' on cpu' if self.offload else ''}",
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


def _gated(cls: type[torch.optim.Optimizer]) -> type[_Gate]:
    return type(f"Gated{cls.__name__}", (_Gate, cls), {})
