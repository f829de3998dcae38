"""DeepSpeed ZeRO: moments (stage 1), gradients (stage 2) and parameters (stage 3) sharded over all processes.

DeepSpeed shards flat buffers instead of rows, and parameters cannot change shape after ``deepspeed.initialize``. Rank
events and checkpoints therefore gather one parameter at a time and keep this process's rows, divided as by FSDP2.
Weights are float32 in any precision, and with bf16 they are cast where they are used (``torch_autocast``). A checkpoint
for another engine thus loses no precision.

This module is tested with the versions in the extra ``deepspeed``. At stages 1 and 2 it uses two private parts of
DeepSpeed: the function that links moments to parameters, and the fragments of gradients.
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
from ..lowrank.cores import product_gradients
from ..lowrank.layer import core_names
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
    """Language model in a DeepSpeed engine, which is replaced at every rank event.

    Args:
        skeleton, layout, values, context, optimizer, options: as for ``Engine``.
        stage: stage of ZeRO. 0: replicas, as with DDP.
        config: result of ``deepspeed_config``.
        passed_on: whether ``config`` includes settings of the user, so that errors of DeepSpeed are reported as theirs.
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
        os.environ.setdefault("LOCAL_RANK", str(context.local_rank))  # DeepSpeed requires it even without a launcher
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
            # All-gather whole blocks: fewer and larger collectives, and fused layers need several weights at once.
            self.utils.set_z3_leaf_modules(module, list({type(block) for block in self.plan.block_modules(module)}))
            # Stage 3 gathers a block's parameters in the backward pass only if the input of the block needs a gradient.
            for embedding in module.modules():
                if isinstance(embedding, nn.Embedding) and not embedding.weight.requires_grad:
                    embedding.register_forward_hook(_require_gradient)

    def _make_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        cls = self._optimizer_class
        make = partial(cls, fused=True) if issubclass(cls, torch.optim.AdamW) else cls
        return self._optimizer_of(module, elementwise=make)

    @staticmethod
    def _find_optimizer(context: Context, settings: OptimizerSettings, offload: bool) -> type["_Gate"]:
        """Return the optimizer class.

        AdamW on GPUs or with offload is DeepSpeed's implementation if all processes can build its kernel. In all other
        cases the class is torch's.
        """
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
            except Exception as error:  # a build can fail in any way
                logging.getLogger("inrank_dist").info("DeepSpeed's Adam kernel cannot be built: %s", error)
        everywhere = all(context.gather(found is not None))
        return _gated(found if found is not None and everywhere else torch.optim.AdamW)

    def _wrap(self, module: nn.Module) -> nn.Module:
        # DeepSpeed allocates a gradient bucket of its default size even if the model is much smaller.
        trained = sum(self._shape(p).numel() for p in module.parameters() if p.requires_grad)
        buckets = {"zero_optimization": {"reduce_bucket_size": min(trained, MOST_IN_A_BUCKET)}}
        config = merge(buckets, self.config)
        with explained(self.passed_on):
            engine, _, _, _ = self.deepspeed.initialize(model=module, optimizer=self.optimizer, config=config)
        self._make_moments(engine.optimizer)
        return cast(nn.Module, engine)

    def _make_moments(self, zero: Any) -> None:
        """Initialise the moments with zeros and link them to the parameters.

        DeepSpeed does this at the first step, but links only the moments of the first parameter group.
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
        """Return this process's shards of the reduced gradients."""
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
        """Wait for the gradients, which ZeRO-2 copies to the CPU asynchronously with optimizer offload."""
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
        """Clear the gradients by a step of DeepSpeed that skips the optimizer."""
        gate = cast(_Gate, self.optimizer)
        gate.held = True
        cast(Any, self.model).step()
        gate.held = False

    def _decay_products(self, rate: float) -> None:
        """Apply Frobenius decay as ``Engine._decay_products`` does, on gathered factors, one layer at a time."""
        parameters = self.parameters()
        for layer, each in self.layout.items():
            names = [f"{layer}.{leaf}" for leaf in ("U", "V", *core_names(each.depth))]
            held = [parameters[name] for name in names]
            with self.deepspeed.zero.GatheredParameters(held, enabled=self.stage == 3):
                U, V, *cores = (parameter.detach().clone() for parameter in held)
            factors = Factors(U, V, tuple(cores))
            gram = gram_matrices({layer: factors}, lambda tensor: None)[layer]
            gradients = product_gradients(factors, gram).values()
            for name, parameter, whole, gradient in zip(names, held, (U, V, *cores), gradients, strict=True):
                if parameter.requires_grad:
                    scale = rate * self._lr_scales.get(name, 1.0)
                    self._write(parameter, whole - scale * gradient.to(whole.dtype))

    def facts(self) -> dict[str, str]:
        from deepspeed.accelerator import get_accelerator

        cls = self._optimizer_class.__bases__[1]
        return {
            "deepspeed": self.deepspeed.__version__,
            "accelerator": get_accelerator().device_name(),
            "backend": dist.get_backend(),
            "optimizer": f"{cls.__module__.partition('.')[0]} {cls.__name__}{' on cpu' if self.offload else ''}",
        }


def _require_gradient(module: nn.Module, inputs: object, output: Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_()


def _forget_models() -> None:
    """Clear global state of ZeRO-3 that would keep every earlier model alive.

    It consists of the stack of modules in their forward pass, from which the first module is never removed, and of
    caches that hold references to their arguments.
    """
    importlib.import_module("deepspeed.runtime.zero.parameter_offload").FWD_MODULE_STACK.clear()
    coordinator = importlib.import_module("deepspeed.runtime.zero.partitioned_param_coordinator")
    for method in vars(coordinator.PartitionedParameterCoordinator).values():
        wrapped = [cell.cell_contents for cell in getattr(method, "__closure__", None) or ()]  # unwrap decorators
        for each in (method, *wrapped):
            if hasattr(each, "cache_clear"):
                each.cache_clear()


class _Gate(torch.optim.Optimizer):
    """Mixin for the optimizer that DeepSpeed calls. It scales gradients for clipping and can skip a step.

    Attributes:
        scale: scalar to multiply all gradients with. None: 1.
        held: whether ``step`` does nothing.
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
            # DeepSpeedCPUAdam accumulates the powers of the betas by multiplication, and a resumed run computes them
            # from scratch. Recreate it in each step, so that both give the same result.
            group = self.param_groups[0]
            betas, eps, decay = group["betas"], group["eps"], group["weight_decay"]
            self.ds_opt_adam.create_adam(self.opt_id, group["lr"], *betas, eps, decay, True, False)
        return super().step(closure)


def _gated(cls: type[torch.optim.Optimizer]) -> type[_Gate]:
    return type(f"Gated{cls.__name__}", (_Gate, cls), {})
