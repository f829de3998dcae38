"""An engine holds the model and its optimizer, in one piece or in shards. The training loop never asks which."""

import gc
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ..lowrank.convert import Layout, convert
from ..lowrank.event import RankEvent, map_factors
from ..lowrank.layer import Activation, set_activation, set_base_scale, set_joining
from ..lowrank.spectrum import DenseRows, Factors, gram_matrices, identity_rows
from ..models import LanguageModel
from ..optim import (
    HeldRows,
    OptimizerSettings,
    build_optimizer,
    decayed_parameters,
    map_moments,
    moment_names,
    moments_of_right_factor,
    parameter_kinds,
)
from ..runtime.context import Context

Values = Callable[[str], Tensor]
"""Parameter name -> its whole start value on CPU, the same on every process."""


Batches = Sequence[tuple[Tensor, Tensor]]
"""Micro-batches of inputs and targets, each ``(B, T)`` int64."""


@dataclass(frozen=True)
class SavedRows:
    """One process's part of a tensor that is saved.

    Attributes:
        name: of the tensor, as in ``Engine.tensors``.
        shape: of the whole.
        dtype: of it.
        first, count: the rows of it that this process alone saves; there may be none.
        fetch: gives these rows; they may share memory with the engine. With ZeRO it is a collective, so that every
            process fetches every tensor, in the order of ``Engine.saved_rows``.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    first: int
    count: int
    fetch: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of these rows."""
        return self.count * self.shape[1:].numel() * self.dtype.itemsize


@dataclass(frozen=True)
class BuildOptions:
    """How the model is made to run.

    Attributes:
        bf16: compute in bfloat16 (weights, gradients and moments stay float32).
        compile: compile each block and the loss: one graph for all ranks while they grow, static shapes after that.
        cuda_graph: replay compiled blocks as CUDA graphs once shapes are static (GPUs only).
        fuse: run factors that read the same input as one product.
        activation: between the factors.
        activation_checkpointing: recompute each block in the backward pass.
        grad_clip: largest gradient norm; 0: none.
        frobenius_decay: decoupled decay of ``|U V^T|_F^2 / 2``; 0: none.
    """

    bf16: bool = False
    compile: bool = False
    cuda_graph: bool = False
    fuse: bool = True
    activation: Activation = "none"
    activation_checkpointing: bool = False
    grad_clip: float = 1.0
    frobenius_decay: float = 0.0


class Engine:
    """The model in one process. Subclasses override how parameters are placed and gradients are combined.

    Reshaping is rebuilding: the model is converted again from the dense ``meta`` skeleton with the new layout, given
    the old tensors (mapped where the rank changed), and gets a new optimizer with the old moments (mapped likewise).

    Attributes:
        bad_gradient: whether this process computed a gradient that is not finite in the last ``accumulate``; bool.

    Args:
        skeleton: dense model on ``meta`` with ``tok_embed`` and ``blocks``; it is never changed.
        layout: the low-rank layers as they start.
        values: start values; None: zeros, to be read into.
    """

    name = "local"

    def __init__(
        self,
        skeleton: LanguageModel,
        layout: Layout,
        values: Values | None,
        *,
        context: Context,
        optimizer: OptimizerSettings,
        options: BuildOptions,
    ) -> None:
        self.skeleton, self.context, self.device = skeleton, context, context.device
        self.optimizer_settings, self.options = optimizer, options
        self.optimizer_steps = 0
        self.bad_gradient = torch.zeros((), dtype=torch.bool, device=context.device)
        self._base_scale, self._compiled_for_growth = 1.0, False

        def start(name: str, parameter: nn.Parameter) -> Tensor:
            if values is None:
                first, end = self.rows(parameter.shape[0])
                return torch.zeros(end - first, *parameter.shape[1:], device=self.device)
            # A copy of the rows: a view would keep the whole tensor alive.
            return values(name)[slice(*self.rows(parameter.shape[0]))].to(self.device, copy=True).contiguous()

        self._build(layout, start)

    # How parameters are held: what a sharding engine overrides.

    def rows(self, size: int) -> tuple[int, int]:
        """First row and end of the rows that this process holds of a parameter with ``size`` rows."""
        return 0, size

    def counted_rows(self, size: int) -> tuple[int, int]:
        """The part of ``rows`` that this process alone counts: over all processes every row exactly once."""
        return self.rows(size)

    def _shard(self, module: LanguageModel) -> None:
        """Shard a module on ``meta``, in place."""

    def _wrap(self, local: Tensor, shape: torch.Size) -> Tensor:
        """Make the tensor that stands for a whole one of this shape from this process's rows of it."""
        return local

    def _local(self, tensor: Tensor) -> Tensor:
        """This process's rows of a parameter, gradient or moment; shares memory with it."""
        return tensor.detach()

    def _assign(self, module: LanguageModel, rows: Callable[[str, nn.Parameter], Tensor]) -> None:
        """Give a module on ``meta`` its parameters, from this process's rows of them."""
        placed: dict[int, nn.Parameter] = {}
        state = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if id(parameter) not in placed:  # tied parameters stay one object
                wrapped = self._wrap(rows(name, parameter), parameter.shape)
                placed[id(parameter)] = nn.Parameter(wrapped, requires_grad=parameter.requires_grad)
            state[name] = placed[id(parameter)]
        module.load_state_dict(state, assign=True)

    def _callable(self, module: LanguageModel) -> nn.Module:
        """What is called in place of the module, whose optimizer is made."""
        return module

    def release(self) -> None:
        """Let go of the model and its optimizer; without a build there is no more use for this engine."""
        del self.module, self.model, self.optimizer
        gc.collect()  # a model is a web of cycles; its memory is wanted at once

    def _sum_over_shards(self, tensor: Tensor) -> None:
        """Sum in place over the processes that hold different rows of the same replica."""

    def _settle(self) -> None:
        """Give up what a forward pass without a backward pass left gathered."""

    def _accumulating(self, last: bool) -> AbstractContextManager[object]:
        """Context of one micro-batch; gradients are combined over processes in the last one only."""
        return nullcontext()

    # Building.

    def _build(self, layout: Layout, local: Callable[[str, nn.Parameter], Tensor]) -> None:
        module = convert(self.skeleton, layout)
        set_joining(module, self.options.fuse)
        set_activation(module, self.options.activation)
        for block in module.blocks:
            if self.options.activation_checkpointing:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if self.options.compile:
            self._compile(module, growing=any(layer.modes > layer.rank for layer in layout.values()))
        module.tok_embed.register_forward_hook(self._observe)
        decayed = decayed_parameters(module, factors=self.options.frobenius_decay == 0)
        self._kinds = parameter_kinds(module, module.blocks, self.optimizer_settings)
        self._shard(module)
        self._assign(module, local)
        for owner in module.modules():
            for name, buffer in list(owner.named_buffers(recurse=False)):
                owner.register_buffer(name, torch.empty_like(buffer, device=self.device), persistent=False)
        module.reset_buffers()
        set_base_scale(module, self._base_scale)
        self.layout = dict(layout)
        self.module = module
        self.optimizer = self._build_optimizer(dict(module.named_parameters()), decayed)
        self.model = self._callable(module)

    def _compile(self, module: LanguageModel, *, growing: bool) -> None:
        """Have the blocks and the loss compiled when they are first called.

        While ranks grow they are symbols: the second rank that a graph meets makes it one for all (four blocks with 24
        ranks and three growths took three compilations). After that each block has the shapes that it keeps. On two CPU
        cores compiling takes a tenth off the peak memory of GPT-2 small, and nothing off the time (README).
        """
        from torch import _dynamo  # slow to import, and of use here alone

        # Blocks share their code, so each layout of a block, in train and in eval mode, is one more compilation of the
        # same function; past torch's limits it would go on without compiling, and say so to nobody.
        limit = 4 * len(module.blocks) + 16
        _dynamo.config.recompile_limit = max(_dynamo.config.recompile_limit, limit)
        _dynamo.config.accumulated_recompile_limit = max(_dynamo.config.accumulated_recompile_limit, limit)
        # Parameters are taken for static unless told otherwise; without growth `dynamic=False` says that they are.
        _dynamo.config.force_parameter_static_shapes = False
        _dynamo.config.force_nn_module_property_static_shapes = False
        if self._compiled_for_growth and not growing:
            torch.compiler.reset()  # what was compiled for growth is of no more use
        self._compiled_for_growth = growing
        dynamic = None if growing else False
        graphs = self.options.cuda_graph and not growing and self.device.type == "cuda"
        for block in module.blocks:
            block.compile(dynamic=dynamic, mode="reduce-overhead" if graphs else None)
        module.token_loss.compile(dynamic=dynamic)

    def _build_optimizer(self, parameters: Mapping[str, nn.Parameter], decayed: Set[str]) -> torch.optim.Optimizer:
        dtype = torch.bfloat16 if self.options.bf16 else torch.float32
        return build_optimizer(
            parameters, self._kinds, decayed, self.optimizer_settings, rows=self._held_rows(), matrix_dtype=dtype
        )

    def _held_rows(self) -> HeldRows:
        """How parameters are held, for the optimizer."""
        return HeldRows(self._local, self._sum_over_shards, lambda size: [size])

    def reshape(
        self,
        layout: Layout,
        events: Mapping[str, RankEvent],
        directions: Callable[[str], Tensor],
    ) -> None:
        """Change the shapes of layers; only this process's rows are touched.

        Nothing travels, unless dense layers become factors: then one all-reduce a layer, of ``8 in R`` bytes for each
        of its moments.

        Args:
            layout: all low-rank layers as they shall be.
            events: the maps of those whose rank changes, and of dense layers that become factors, whose weight is
                taken for ``U`` and the identity for ``V``.
            directions: layer -> its whole ``Z: (in, F)``, asked only where there are fresh modes.
        """
        tensors, moments = self._rows()
        settings = self.optimizer_settings
        betas = (settings.beta1, settings.beta2)
        for layer, event in events.items():
            rule = settings.moments_on_event
            of_weight = None
            if layer not in self.layout:
                of_weight = self._as_factors(layer, tensors, moments)
                rule = "reset" if rule == "slice" else rule  # the columns of a weight are no modes
            names = {factor: f"{layer}.{factor}" for factor in "UV"}
            U, V = (tensors[name] for name in names.values())
            Z = None
            if event.fresh:
                Z = directions(layer)[slice(*self.rows(self._in_features(layer)))].to(self.device)
            factors = map_factors(event, U, V, Z)
            tensors[names["U"]], tensors[names["V"]] = factors.U, factors.V
            for factor, name in names.items():
                if moments[name]:
                    moments[name] = map_moments(
                        event, factor, moments[name], step=self.optimizer_steps, betas=betas, rule=rule
                    )
            if of_weight:
                size = len(tensors[names["V"]])
                moments[names["V"]] = {name: factors.V.new_zeros(size, event.modes) for name in of_weight}
                if rule == "transport":
                    moments[names["V"]] = self._moments_of_right_factor(layer, of_weight, factors.U, betas)
        self.release()
        self._build(layout, lambda name, _: tensors[name])
        for name, parameter in self.parameters().items():
            self._set_moments(parameter, moments[name])
        self.check()

    def _as_factors(
        self, layer: str, tensors: dict[str, Tensor], moments: dict[str, dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Rename a dense layer's weight to ``U`` and add the identity as ``V``; returns the moments of the weight."""
        weight, in_features = f"{layer}.weight", self._in_features(layer)
        tensors[f"{layer}.U"] = tensors.pop(weight)
        tensors[f"{layer}.V"] = identity_rows(*self.rows(in_features), in_features, self.device)
        moments |= {f"{layer}.U": moments.pop(weight), f"{layer}.V": {}}
        return moments[f"{layer}.U"]

    def _moments_of_right_factor(
        self, layer: str, of_weight: Mapping[str, Tensor], U: Tensor, betas: tuple[float, float]
    ) -> dict[str, Tensor]:
        """This process's rows of the moments of ``V`` after the layer was dense."""
        out_features = cast(nn.Linear, self.skeleton.get_submodule(layer)).out_features
        counted = {name: self.counted(moment, out_features) for name, moment in of_weight.items()}
        rows = slice(*self.rows(self._in_features(layer)))
        whole = moments_of_right_factor(
            counted, self.counted(U, out_features), self.context.sum, step=self.optimizer_steps, betas=betas
        )
        return {name: moment[rows].clone() for name, moment in whole.items()}

    def _in_features(self, layer: str) -> int:
        return cast(nn.Linear, self.skeleton.get_submodule(layer)).in_features

    def _rows(self) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """This process's rows of every parameter, and of what the optimizer remembers of it."""
        parameters = self.parameters()
        moments = {name: self._moments(parameter) for name, parameter in parameters.items()}
        return {name: self._local(parameter) for name, parameter in parameters.items()}, moments

    def check(self) -> None:
        """Assert that the optimizer's parameters are the model's, every one of them."""
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        present = {id(p) for p in self.parameters().values() if p.requires_grad}
        assert held == present, "the optimizer holds other parameters than the model"

    # One optimizer step.

    def accumulate(self, batches: Batches, tokens: int, *, training: bool = True) -> Tensor:
        """Forward and backward of this process's share of a global batch.

        Args:
            batches: micro-batches of this process.
            tokens: tokens of the whole global batch, by which the loss is divided.
            training: with dropout; without, the gradient is that of the model as it is.

        Returns:
            This process's summed loss in nats, a float32 scalar on the device (no synchronisation).
        """
        self.model.train(training)
        self.bad_gradient.zero_()
        total = torch.zeros((), device=self.device)
        for index, (inputs, targets) in enumerate(batches):
            with self._accumulating(last=index == len(batches) - 1):
                loss = self.loss(inputs, targets)
                # Gradients are averaged over processes; the sum is wanted.
                self._backward(loss * (self.context.world_size / tokens))
            total += loss.detach()
        return total

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Summed loss of one micro-batch, in the model's present mode (train or eval)."""
        inputs, targets = (t.to(self.device, non_blocking=True) for t in (inputs, targets))
        if self.options.cuda_graph:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bf16):
            loss: Tensor = self.model(inputs, targets)
        return loss

    def logits(self, inputs: Tensor) -> Tensor:
        """``(B, T, vocabulary)`` logits of ``(B, T)`` tokens; all processes call it together."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bf16):
            logits: Tensor = self.model(inputs.to(self.device))
        return logits

    def _observe(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        """See whether the gradient that comes out at the bottom of this process's own batch is finite: once gradients
        are combined, nobody can tell whose was not."""
        if output.requires_grad:
            output.register_hook(self._note)

    def _note(self, gradient: Tensor) -> None:
        self.bad_gradient.logical_or_(~gradient.detach().isfinite().all())

    @torch.no_grad()
    def is_lost(self) -> Tensor:
        """Whether anything that this process holds is not finite; float64, 1 or 0, on the device."""
        # One pass without a temporary; aminmax propagates nan, and inf is an extreme. isfinite takes 14 times as long.
        extremes = [torch.stack(torch.aminmax(rows)).to(self.device) for rows in self._held() if rows.numel()]
        finite = torch.cat(extremes or [torch.zeros(1, device=self.device)]).isfinite().all()
        return (~finite).double()

    def _held(self) -> Iterable[Tensor]:
        """Every parameter and moment, as far as this process holds it."""
        return (self._local(tensor) for tensor in self.tensors().values())

    @torch.no_grad()
    def gradient_norm(self) -> tuple[Tensor, Tensor]:
        """Norm of the gradient over all parameters, and of what this process holds of it; float32 scalars on the
        device."""
        mine = torch.nn.utils.get_total_norm(self._gradients()).to(self.device)
        norm = mine.square()
        self._sum_over_shards(norm)
        return norm.sqrt(), mine

    @torch.no_grad()
    def step(self, lr: float, norm: Tensor) -> None:
        """Clip the gradients, move the parameters, drop the gradients.

        Args:
            norm: from ``gradient_norm``.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        if self.options.frobenius_decay > 0:
            self._decay_products(lr * self.optimizer_settings.matrix_scale * self.options.frobenius_decay)
        clip = self.options.grad_clip
        self._move((clip / (norm + 1e-6)).clamp(max=1.0) if clip > 0 else None)
        self.optimizer_steps += 1

    def _move(self, scale: Tensor | None) -> None:
        """Take the optimizer's step with the gradients times ``scale``, and drop them."""
        if scale is not None:
            torch._foreach_mul_(self._gradients(), scale)
        self.optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Forget the gradients; nothing else changes."""
        self.optimizer.zero_grad()

    def _gradients(self) -> list[Tensor]:
        return [self._local(p.grad) for p in self.parameters().values() if p.grad is not None]

    def _decay_products(self, rate: float) -> None:
        """``U -= rate * U (V^T V)`` and ``V -= rate * V (U^T U)``: the gradient of ``|U V^T|_F^2 / 2`` (arXiv
        2209.13569)."""
        grams = gram_matrices(self.factors(), self.context.sum)
        parameters = self.parameters()
        for layer, gram in grams.items():
            U, V = (self._local(parameters[f"{layer}.{factor}"]) for factor in "UV")
            U -= rate * (U @ gram.V.to(U.dtype))
            V -= rate * (V @ gram.U.to(V.dtype))

    # Factors and tensors.

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters as they are held between steps, by name; tied ones once."""
        self._settle()
        return dict(self.module.named_parameters())

    def set_base_scale(self, scale: float) -> None:
        """Set the factor ``a`` of every base."""
        if scale != self._base_scale:
            self._base_scale = scale
            set_base_scale(self.module, scale)

    def factors(self) -> dict[str, Factors]:
        """Rows of every low-rank layer's factors that this process alone counts."""
        parameters = self.parameters()
        return {
            layer: Factors(*(self._counted(parameters[f"{layer}.{factor}"]) for factor in "UV"))
            for layer in self.layout
        }

    def dense_factors(self, layers: Iterable[str]) -> dict[str, DenseRows]:
        """The weights of dense layers as factors: rows that this process alone counts."""
        parameters = self.parameters()
        return {
            layer: DenseRows(self._counted(parameters[f"{layer}.weight"]), *self.counted_rows(self._in_features(layer)))
            for layer in layers
        }

    def factor_gradients(self, batches: Batches, tokens: int) -> dict[str, Factors]:
        """Gradients of every layer's factors on a global batch, all rows that this process holds; nothing is moved."""
        self.accumulate(batches, tokens, training=False)
        parameters = self.parameters()
        gradients = {
            layer: Factors(*(self._gradient(parameters[f"{layer}.{factor}"]) for factor in "UV"))
            for layer in self.layout
        }
        self.drop_gradients()
        return gradients

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        """This process's rows of a parameter's gradient, copied."""
        assert parameter.grad is not None
        return self._local(parameter.grad).clone()

    @torch.no_grad()
    def set_columns(self, layer: str, first: int, U: Tensor | float, V: Tensor | float) -> None:
        """Overwrite the columns from ``first`` on of this process's rows of a layer's factors."""
        parameters = self.parameters()
        for factor, columns in (("U", U), ("V", V)):
            self._local(parameters[f"{layer}.{factor}"])[:, first:] = columns

    def held_rows(self, layer: str) -> Factors:
        """All rows of a layer's factors that this process holds, counted or not; they share memory with the engine."""
        parameters = self.parameters()
        return Factors(*(self._local(parameters[f"{layer}.{factor}"]) for factor in "UV"))

    def counted(self, rows: Tensor, size: int) -> Tensor:
        """Of the rows that this process holds of something with ``size`` rows, those that it alone counts."""
        offset, (start, end) = self.rows(size)[0], self.counted_rows(size)
        return rows[start - offset : end - offset]

    def _counted(self, parameter: nn.Parameter) -> Tensor:
        return self.counted(self._local(parameter), self._shape(parameter)[0])

    def _shape(self, parameter: nn.Parameter) -> torch.Size:
        """Shape of a parameter as a whole."""
        return parameter.shape

    def tensors(self) -> dict[str, Tensor]:
        """Everything to save, by name: parameters under their own names, moments under names such as
        ``optimizer.exp_avg.NAME``. Sharded ones are DTensors. They may share memory with the engine."""
        saved: dict[str, Tensor] = {}
        for name, parameter in self.parameters().items():
            shape = self._shape(parameter)
            saved[name] = self._wrap(self._local(parameter), shape)
            for moment, rows in self._moments(parameter).items():
                saved[f"optimizer.{moment}.{name}"] = self._wrap(rows, shape)
        return saved

    def saved_rows(self) -> list[SavedRows]:
        """This process's part of everything to save: over all processes every row of every tensor exactly once.

        Nothing is fetched or copied yet. The names, and their order, are the same on every process.
        """
        saved: list[SavedRows] = []

        def save(name: str, parameter: nn.Parameter, held: Callable[[], Tensor]) -> None:
            shape = self._shape(parameter)
            first, end = self.counted_rows(shape[0])
            fetch = partial(lambda held, size: self.counted(held(), size), held, shape[0])
            saved.append(SavedRows(name, shape, parameter.dtype, first, end - first, fetch))

        for name, parameter in self.parameters().items():
            save(name, parameter, partial(self._local, parameter))
            for moment in self._moment_names(parameter):
                save(f"optimizer.{moment}.{name}", parameter, partial(self._moment, parameter, moment))
        return saved

    def restore(self, steps: int, read: Callable[[dict[str, Tensor]], None]) -> None:
        """Take over everything that was saved.

        Args:
            steps: optimizer steps taken by then.
            read: fills tensors such as ``tensors()`` gave when they were saved, in place.
        """
        self.optimizer_steps = steps
        if steps:
            parameters = self.parameters()
            for name, kind in self._kinds.items():
                local = self._local(parameters[name])
                moments = moment_names(self.optimizer_settings, kind)
                self._set_moments(parameters[name], {moment: torch.zeros_like(local) for moment in moments})
        read(self.tensors())

    def _moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """This process's rows of everything that the optimizer remembers of a parameter."""
        return {name: self._moment(parameter, name) for name in self._moment_names(parameter)}

    def _moment_names(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """What the optimizer remembers of a parameter by now."""
        state = self.optimizer.state.get(parameter, {})
        return tuple(name for name, moment in state.items() if name != "step" and moment is not None)

    def _moment(self, parameter: nn.Parameter, name: str) -> Tensor:
        return self._local(self.optimizer.state[parameter][name])

    def _set_moments(self, parameter: nn.Parameter, moments: Mapping[str, Tensor]) -> None:
        if moments:
            state = {name: self._wrap(moment, parameter.shape) for name, moment in moments.items()}
            if "exp_avg" in state:
                state["step"] = torch.tensor(float(self.optimizer_steps), device=self.device)
            self.optimizer.state[parameter] = state

    def parameter_count(self) -> int:
        """Parameters of the model as it is now, a fading or frozen base included."""
        return sum(self._shape(parameter).numel() for parameter in self.parameters().values())

    def facts(self) -> dict[str, str]:
        """What a user would want to know of how this engine runs here, for the log."""
        return {}


class DDPEngine(Engine):
    """A replica in each process; gradients are averaged by DistributedDataParallel."""

    name = "ddp"

    def counted_rows(self, size: int) -> tuple[int, int]:
        return chunk(size, self.context.rank, self.context.world_size)

    def _callable(self, module: LanguageModel) -> nn.Module:
        devices = [self.device.index] if self.device.type == "cuda" else None
        with warnings.catch_warnings():
            # The newest torch calls it forward_sync_buffers; the oldest that we support knows only this name.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            return DistributedDataParallel(
                module, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def _accumulating(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext() if last else cast(DistributedDataParallel, self.model).no_sync()


def chunk(size: int, index: int, count: int) -> tuple[int, int]:
    """Rows of part ``index`` when ``size`` rows are cut as ``torch.chunk`` cuts them; trailing parts may be empty."""
    rows = -(-size // count)
    return min(index * rows, size), min((index + 1) * rows, size)
