"""Execution of the rank events of a run: measure spectra, decide ranks, check agreement, reshape the model."""

import dataclasses
import time
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..lowrank.convert import LayerLayout
from ..lowrank.cores import absorbed, cores_of
from ..lowrank.criterion import Decision
from ..lowrank.event import RankEvent, freeze_all, grow, orthogonalise
from ..lowrank.init import generator_for
from ..lowrank.null import null_shape
from ..lowrank.spectrum import FactorRows, Factors, Learned, Spectra, measure_spectra
from ..lowrank.updates import recorded_spectrum
from ..runtime.errors import UserError
from .dense import dense_factors, events_of_rows
from .directions import Gradients
from .growth import GROWTHS, Growth
from .holder import FactorHolder
from .initial import StartValues
from .outer import start_outer_factors
from .policy import Action
from .rank_method import METHODS, RankMethod
from .settings import LowRankSettings
from .stable_rank import StableRanks

Record = dict[str, Any]


class RankController:
    """Runs the rank events that the settings schedule on the model of a ``FactorHolder``.

    Args:
        holder: holds the factors.
        values: initial values of the parameters, from which the update since initialisation is computed.
        settings: section ``lowrank``.
        seed: seed of the run. It determines the random directions of fresh modes.
        steps: number of optimizer steps of the run.

    Attributes:
        method: decides when ranks change and to what.
        found: layer -> rank that the rule chose at the last decision. Compare the null rank with this one: at the
            freeze, the allocation may have given the layer another rank.
        reached: layer -> explained ratio of the rank chosen at the last decision.
        checks_without_growth: number of consecutive decisions in which no layer grew.
        frozen: whether the ranks are frozen.
    """

    def __init__(
        self, holder: FactorHolder, values: StartValues, settings: LowRankSettings, seed: int, steps: int
    ) -> None:
        self.holder, self.values, self.settings, self.seed = holder, values, settings, seed
        self.shapes, self.processes = values.shapes, holder.processes
        cls = METHODS.get(settings.mode, RankMethod)  # mode full has no factored layers, so nothing is ever due
        self.method = cls(settings, self.shapes, seed, steps, settings.final_multiple(holder.device.type))
        # Cached on the CPU until the freeze. Drawing the factors again at every check would cost a QR of each. The
        # copy takes a quarter of the memory of the weights, gradients and Adam moments of these columns.
        self._initial_rows = cache(self._draw_initial_rows)
        self.reached: dict[str, float] = {}
        self.found: dict[str, int] = {}
        self.checks_without_growth, self.frozen = 0, False

    def due(self, step: int) -> Action | None:
        """Return the action due after ``step`` completed optimizer steps, or None."""
        if not self.shapes or self.frozen:
            return None
        return self.method.due(step, self.checks_without_growth, dense=not self.holder.layout)

    def before_step(self, step: int) -> None:
        """Set the base scale ``a`` for the forward passes that follow ``step`` completed optimizer steps.

        Before the first step, this also measures the stable ranks of dense layers if they are followed.
        """
        self.holder.set_base_scale(self.method.policy.base_scale(step))
        stable_ranks = self.method.stable_ranks
        if stable_ranks and not step and not stable_ranks.start:
            stable_ranks.measure(self.holder, step)

    def start(self, gradients: Gradients) -> None:
        """Finish the initialisation before the first step of a run, which may need a gradient.

        Args:
            gradients: computes the gradients of all factors on the batch of that step.

        Raises:
            UserError: the gradient is not finite.
        """
        if self.settings.depth == 2 or self.settings.outer_init != "gradient" or not self.holder.layout:
            return
        start_outer_factors(self.holder, gradients)
        if self.settings.outer_lr_scale == 0:
            fixed = {name: dataclasses.replace(layer, fixed_outer=True) for name, layer in self.holder.layout.items()}
            self.holder.reshape(fixed, {}, lambda name: self._directions(name, 0, 0))

    def after_step(self, step: int, gradients: Gradients | None) -> list[Record]:
        """Run the rank event that is due after ``step`` completed optimizer steps, if any.

        Args:
            step: number of completed optimizer steps.
            gradients: computes the gradients of all factors on the batch of that step, for ``growth_init: gradient``.
                None if they are not finite; the directions of new modes are then random.

        Returns:
            Records for the monitors; empty if nothing was due.

        Raises:
            Disagreement: processes measured or decided differently. The model is unchanged.
            UserError: a factor is not finite because training diverged.
        """
        began = time.perf_counter()
        action, followed = self._follow(self.due(step), step)
        layout = dict(self.holder.layout)
        was_dense = not layout
        removes_base = self.method.policy.removes_base(step) and any(layer.base for layer in layout.values())
        if removes_base:
            layout = {name: dataclasses.replace(layer, base=False) for name, layer in layout.items()}
        decisions: dict[str, Decision] = {}
        found: dict[str, int] = {}
        events: dict[str, RankEvent] = {}
        sigma: Mapping[str, Tensor] = {}
        if action:
            decisions, found, sigma, product = self._decide(action, step)
            layout = self._new_layout(layout, decisions, action)
            events = self._plan(layout, product, action, step)
        if layout != self.holder.layout:
            self.holder.reshape(layout, events, lambda name: self._directions(name, step, events[name].fresh))
            fresh = {name: event.fresh for name, event in events.items() if event.fresh and action == "grow"}
            if fresh:
                growth = Growth(self.holder, self.values, self.settings, self.seed, fresh, step, gradients)
                GROWTHS[self.settings.growth_init](growth)
        if action:
            self._remember(decisions, found, action, was_dense=was_dense)
        seconds = time.perf_counter() - began
        records = self._records(step, action, decisions, events, removes_base, seconds)
        if action:
            self._add_spectra(records[0], sigma)
        return followed + records

    def _follow(self, action: Action | None, step: int) -> tuple[Action | None, list[Record]]:
        """Measure the stable ranks of dense layers if they are followed and any action is due.

        Returns:
            The action that remains, ``check`` replaced, and the record of the measurement.
        """
        stable_ranks = self.method.stable_ranks
        if not stable_ranks or not action or self.holder.layout:
            return action, []
        began = time.perf_counter()
        stable_ranks.measure(self.holder, step)
        if action == "check":
            action = self.method.on_settled if stable_ranks.all_settled else None
        return action, [stable_ranks.record(step, time.perf_counter() - began)]

    def _decide(
        self, action: Action, step: int
    ) -> tuple[dict[str, Decision], dict[str, int], Mapping[str, Tensor], Spectra]:
        """Decide the rank of every layer.

        Returns:
            The decisions, the ranks chosen by the rule before the final allocation, the singular values that it chose
            from, and spectra of the products. The latter cover all layers if the rule uses the product, otherwise only
            the layers whose modes change.
        """
        factors = self._factors()
        measured = self._measure(self._updates() if self.method.measures_update else factors, step)
        ranks = {name: layer.rank for name, layer in self.holder.layout.items()}
        decisions = {
            name: self.method.decide(name, sigma, ranks.get(name), action) for name, sigma in measured.sigma.items()
        }
        found = {name: decision.after for name, decision in decisions.items()}
        product = measured
        if self.method.measures_update:
            self._agree(measured, decisions)  # the sizes in the next collective depend on the decisions
            changing = {
                name: layer for name, layer in factors.items() if action == "freeze" or self._widens(decisions, name)
            }
            product = self._measure(changing, step)
        if action == "freeze":
            for name, rank in self.method.final_ranks(product.sigma, decisions).items():
                decisions[name] = self.method.with_rank(decisions[name], rank, name, measured.sigma[name])
        self._agree(product, decisions)
        return decisions, found, measured.sigma, product

    def _factors(self) -> Mapping[str, FactorRows]:
        """Return the counted rows of the factors. Those of a dense layer are its weight and an identity."""
        if not self.holder.layout:
            return dense_factors(self.holder, self.shapes)
        return {name: absorbed(rows) for name, rows in self.holder.factors().items()}

    def _measure(self, factors: Mapping[str, FactorRows], step: int) -> Spectra:
        try:
            return measure_spectra(factors, self.processes)
        except FloatingPointError as error:
            raise UserError(f"at step {step} {error}; write a lower optimizer.lr") from None

    def _agree(self, spectra: Spectra, decisions: Mapping[str, Decision]) -> None:
        """Check that the Grams and decisions of all measured layers are equal on all processes."""
        answers = {name: (decisions[name], checksum) for name, checksum in spectra.checksums.items()}
        if answers:
            self.processes.agree(
                "the ranks",
                {name: [seen, d.before, d.after, d.explained.hex()] for name, (d, seen) in answers.items()},
            )

    def _widens(self, decisions: Mapping[str, Decision], name: str) -> bool:
        """Return whether growth adds modes to a layer. Near ``min(in, out)``, the rank can rise without new modes."""
        return self.method.modes(name, decisions[name].after, "grow") > self.holder.layout[name].modes

    def _new_layout(
        self, layout: dict[str, LayerLayout], decisions: Mapping[str, Decision], action: Action
    ) -> dict[str, LayerLayout]:
        changed = {}
        for name, decision in decisions.items():
            modes = self.method.modes(name, decision.after, action)
            if name in layout:
                changed[name] = dataclasses.replace(layout[name], rank=decision.after, modes=modes)
            else:
                changed[name] = LayerLayout(decision.after, modes, base=False)
        return {**layout, **changed}

    def _plan(
        self, layout: Mapping[str, LayerLayout], product: Spectra, action: Action, step: int
    ) -> dict[str, RankEvent]:
        """Return the events of the layers whose factors change, equal on all processes."""
        factors = self._factors()
        cores = {name: cores_of(factors[name]) for name in product.sigma}
        if action != "grow":
            events = freeze_all(product, {name: layout[name].modes for name in product.sigma}, self.processes, cores)
        else:
            modes = {name: (self.holder.layout[name].modes, layout[name].modes) for name in product.sigma}
            events = {
                name: grow(before, after, cores[name]) for name, (before, after) in modes.items() if after > before
            }
        directions = {}
        for name, event in events.items():
            if event.fresh:
                rows = self.holder.placement(name).counted_rows(self.shapes[name][1])
                directions[name] = self._directions(name, step, event.fresh)[slice(*rows)]
                # Copy the rows, because a view would keep the whole Z of every layer in memory.
                directions[name] = directions[name].to(self.holder.device, copy=True)
        events = orthogonalise(events, factors, product, directions, self.processes)
        return events_of_rows(events, factors, self.holder, self.shapes)

    def _directions(self, layer: str, step: int, count: int) -> Tensor:
        """Draw all rows of the random directions ``Z: (in, F)`` of a layer, equal on all processes."""
        generator = generator_for(self.seed, layer, "growth", step)
        return torch.randn(self.shapes[layer][1], count, generator=generator)

    def _updates(self) -> dict[str, Learned]:
        """Return the factors of the update since initialisation."""
        return {name: Learned(now, self._initial_rows(name)) for name, now in self._factors().items()}

    def _draw_initial_rows(self, layer: str) -> FactorRows:
        """Draw the factors of a layer at initialisation and return the rows that ``holder.factors()`` has."""
        whole = self.values.factors(layer)
        held = self.holder.placement(layer)
        U, V = (rows[slice(*held.counted_rows(len(rows)))].clone() for rows in (whole.U, whole.V))
        return absorbed(Factors(U, V, whole.cores))

    def _remember(
        self, decisions: Mapping[str, Decision], found: dict[str, int], action: Action, *, was_dense: bool
    ) -> None:
        self.method.advance_null(action, was_dense=was_dense)
        self.found = found
        self.reached = {name: decision.reached for name, decision in decisions.items()}
        grew = was_dense or any(d.after > d.before for d in decisions.values())
        self.checks_without_growth = 0 if grew else self.checks_without_growth + 1
        self.frozen = action == "freeze"
        if self.frozen:
            self._initial_rows.cache_clear()

    def _records(
        self,
        step: int,
        action: Action | None,
        decisions: Mapping[str, Decision],
        events: Mapping[str, RankEvent],
        removes_base: bool,
        seconds: float,
    ) -> list[Record]:
        """Return the records of an event.

        Per layer, ``explained`` is the explained ratio of the rank before the decision and ``reached`` that of the rank
        after it.
        """
        records: list[Record] = []
        shrinks = self.method.may_shrink(action)
        when = {"step": step, "seconds": seconds, "threshold": self.method.rule.threshold, "shrinks": shrinks}
        null = {name: self.method.null.of(self.shapes[name]) if self.method.null.checks else None for name in decisions}
        if action:
            layers = {
                name: {
                    "rank": d.after,
                    "found": self.found[name],
                    "explained": d.explained,
                    "reached": d.reached,
                    "null_rank": null[name],
                    "effective_rank": d.effective_rank,
                    "limit": self._limit(name, d.after, d.reached),
                }
                for name, d in decisions.items()
            }
            records.append({"kind": "rank_check", **when, "layers": layers})
        changes = {
            name: {
                "from": d.before,
                "to": d.after,
                "explained": d.explained,
                "reached": d.reached,
                "null_rank": null[name],
                "limit": self._limit(name, d.after, d.reached),
            }
            for name, d in decisions.items()
            if name in events or d.after != d.before
        }
        if changes:
            for name, change in changes.items():
                if self.found[name] != change["to"]:
                    change["found"] = self.found[name]
            records.append({"kind": "rank_event", "action": action, **when, "layers": changes})
        if removes_base:
            records.append({"kind": "base_removed", "step": step})
        return records

    def _limit(self, name: str, rank: int, reached: float | None) -> str | None:
        return self.settings.limit(min(self.shapes[name]), rank, self.found.get(name, rank), reached)

    def _add_spectra(self, check: Record, sigma: Mapping[str, Tensor]) -> None:
        """Add to the record of a check the spectra that the rule chose from, and those of untrained factors.

        ``norm`` is the Frobenius norm of a layer's spectrum. A null spectrum has the Frobenius norm 1; there is one for
        each shape, without regard to its order.
        """
        for name, entry in check["layers"].items():
            entry |= {"shape": list(self.shapes[name]), "norm": float(sigma[name].norm())}
            entry |= recorded_spectrum(sigma[name])
        null = {shape: self.method.null.spectrum(shape) for shape in {*map(null_shape, self.shapes.values())}}
        check["null_spectra"] = [
            {"shape": list(shape), **recorded_spectrum(spectrum)}
            for shape, spectrum in sorted(null.items())
            if spectrum is not None
        ]

    @property
    def shrinks(self) -> bool:
        """Whether the ranks are frozen and the freeze could lower them."""
        return self.frozen and self.settings.shrinks

    def table(self) -> dict[str, Record]:
        """Return per layer: rank, rank chosen by the rule, null rank, explained ratio and what limits it, shape."""
        table = {}
        for name, layer in self.holder.layout.items():
            reached = self.reached.get(name)
            table[name] = {
                "rank": layer.rank,
                "found": self.found.get(name, layer.rank),
                "null_rank": self.method.null.of(self.shapes[name]) if self.method.null.checks else None,
                "reached": reached,
                "limit": self._limit(name, layer.rank, reached),
                "shape": list(self.shapes[name]),
            }
        return table

    def state_dict(self) -> dict[str, Any]:
        """Return the state, without the layout, as JSON-serialisable values."""
        followed = None if self.holder.layout else self.method.stable_ranks  # of no use once layers are factored
        return {
            "null": self.method.null.state_dict(),
            "explained": self.reached,
            "found": self.found,
            "quiet": self.checks_without_growth,
            "frozen": self.frozen,
            "stable_ranks": (followed or StableRanks(self.shapes, 0, 1)).state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state.

        Raises:
            UserError: the layers are still dense, and their stable ranks at initialisation are not in the state.
        """
        if self.method.stable_ranks and not self.holder.layout:
            self.method.stable_ranks.load_state_dict(state["stable_ranks"])
            if not self.method.stable_ranks.start:
                raise UserError(
                    "lowrank.dense_until is stable_rank but the checkpoint was written without it and has no stable "
                    "ranks of the initialisation; write lowrank.dense_until: fraction"
                )
        self.method.null.load_state_dict(state["null"])
        self.reached, self.found = dict(state["explained"]), dict(state["found"])
        self.checks_without_growth, self.frozen = state["quiet"], state["frozen"]
