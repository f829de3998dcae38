"""The rank events of a run: measure, decide, agree, reshape. The loop sees one call."""

import dataclasses
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from ..engine.engine import Engine
from ..lowrank.convert import LayerLayout
from ..lowrank.criterion import Decision
from ..lowrank.event import RankEvent, freeze, grow, orthogonalise
from ..lowrank.init import generator_for, start_factors
from ..lowrank.null import NullRanks
from ..lowrank.policy import Action
from ..lowrank.settings import LowRankSettings
from ..lowrank.spectrum import Factors, Grams, gram_matrices, singular_values
from .start import StartValues

Record = dict


class RankEvents:
    """Follows the calendar of ``lowrank.*`` and changes the engine's model when it says so.

    Attributes:
        null: the null ranks so far.
        explained: layer -> share of the spectrum that its rank explained at the last decision.

    Args:
        engine: holds the model.
        values: knows how factors were born (for ``measure: update`` without a base, and the null rank).
        settings: section ``lowrank``.
        seed: of the run; fresh directions come from it.
    """

    def __init__(self, engine: Engine, values: StartValues, settings: LowRankSettings, seed: int) -> None:
        self.engine, self.values, self.settings, self.seed = engine, values, settings, seed
        self.rule, self.policy, self.shapes = settings.rule, settings.policy, values.shapes
        born = self._born if settings.base == "none" and settings.measure == "product" else None
        self.null = NullRanks(self.rule, settings.initial_rank, seed, born)
        self.explained: dict[str, float] = {}

    def before_step(self, step: int) -> None:
        """Set what the forward passes after ``step`` completed optimizer steps need."""
        self.engine.set_base_scale(self.policy.base_scale(step))

    def after_step(self, step: int) -> list[Record]:
        """Do what is due after ``step`` completed optimizer steps.

        Returns:
            Records for the monitors, none when nothing was due.

        Raises:
            Disagreement: processes decided differently; nothing was touched.
        """
        began = time.perf_counter()
        layout = dict(self.engine.layout)
        action = self.policy.action(step) if self.shapes else None
        removes_base = self.policy.removes_base(step) and any(layer.base for layer in layout.values())
        if removes_base:
            layout = {name: dataclasses.replace(layer, base=False) for name, layer in layout.items()}
        decisions: dict[str, Decision] = {}
        events: dict[str, RankEvent] = {}
        if action:
            grams = gram_matrices(self.engine.factors(), self.engine.context.sum)
            decisions = self._decide(grams)
            self.null.advance(set(self.shapes.values()))
            self.explained = {name: decision.reached for name, decision in decisions.items()}
            layout = self._new_layout(layout, decisions, action)
            events = self._plan(layout, grams, action, step)
        if layout != self.engine.layout:
            self.engine.reshape(layout, events, lambda name: self._directions(name, step, events[name].fresh))
        return self._records(step, action, decisions, events, removes_base, time.perf_counter() - began)

    def _decide(self, grams: Mapping[str, Grams]) -> dict[str, Decision]:
        measured = grams
        if self.settings.base == "none" and self.settings.measure == "update":
            measured = gram_matrices(self._updates(), self.engine.context.sum)
        decisions = {
            name: self.rule.decide(singular_values(gram), self.engine.layout[name].rank, min(self.shapes[name]))
            for name, gram in measured.items()
        }
        self.engine.context.agree(
            "the ranks", {name: [d.before, d.after, d.explained.hex()] for name, d in decisions.items()}
        )
        return decisions

    def _new_layout(
        self, layout: dict[str, LayerLayout], decisions: Mapping[str, Decision], action: Action
    ) -> dict[str, LayerLayout]:
        changed = {}
        for name, decision in decisions.items():
            rank = decision.after
            modes = rank if action == "freeze" else self.rule.modes(rank, min(self.shapes[name]))
            changed[name] = dataclasses.replace(layout[name], rank=rank, modes=modes)
        return {**layout, **changed}

    def _plan(
        self, layout: Mapping[str, LayerLayout], grams: Mapping[str, Grams], action: Action, step: int
    ) -> dict[str, RankEvent]:
        """The maps of the layers that change; one more all-reduce where there are fresh modes."""
        events = {}
        for name, gram in grams.items():
            before, after = self.engine.layout[name].modes, layout[name].modes
            if action == "freeze":
                events[name] = freeze(gram, after)
            elif after > before:
                events[name] = grow(before, after)
        factors = self.engine.factors()
        fresh = {}
        for name, event in events.items():
            if event.fresh:
                rows = self.engine.counted_rows(self.shapes[name][1])
                fresh[name] = self._directions(name, step, event.fresh)[slice(*rows)].to(self.engine.device)
        return orthogonalise(events, factors, grams, fresh, self.engine.context.sum)

    def _directions(self, layer: str, step: int, count: int) -> Tensor:
        """The whole random ``Z: (in, F)`` of a layer, the same in every process; drawn again rather than kept."""
        generator = generator_for(self.seed, layer, "growth", step)
        return torch.randn(self.shapes[layer][1], count, generator=generator)

    def _updates(self) -> dict[str, Factors]:
        """Factors of ``U V^T - U0 V0^T``: what was learned, where the factors were not born zero.

        As ``[U - U0, U0] [V, V - V0]^T`` with differences in float64: ``[U, U0] [V, -V0]^T`` is the same matrix, but a
        small update would drown in the rounding of its Grams.
        """
        stacked = {}
        for name, now in self.engine.factors().items():
            born = self.values.factors(name)
            U, V = now.U.double(), now.V.double()
            U0, V0 = torch.zeros_like(U), torch.zeros_like(V)  # columns that came by growth were born zero
            for whole, mine, size in ((born.U, U0, self.shapes[name][0]), (born.V, V0, self.shapes[name][1])):
                mine[:, : whole.shape[1]] = whole[slice(*self.engine.counted_rows(size))]
            stacked[name] = Factors(torch.cat([U - U0, U0], dim=1), torch.cat([V, V - V0], dim=1))
        return stacked

    def _born(self, out_features: int, in_features: int, modes: int) -> Factors:
        """Factors of a shape as they are born; the explained ratio does not see their scale."""
        generator = generator_for(self.seed, "null born", out_features, in_features)
        return start_factors(out_features, in_features, modes, self.settings.init, 1.0, generator)

    def _records(
        self,
        step: int,
        action: Action | None,
        decisions: Mapping[str, Decision],
        events: Mapping[str, RankEvent],
        removes_base: bool,
        seconds: float,
    ) -> list[Record]:
        records: list[Record] = []
        null = {name: self.null.of(self.shapes[name]) for name in decisions}
        if action:
            layers = {
                name: {
                    "rank": d.after,
                    "explained": d.explained,
                    "null_rank": null[name],
                    "effective_rank": d.effective_rank,
                }
                for name, d in decisions.items()
            }
            records.append({"kind": "rank_check", "step": step, "seconds": seconds, "layers": layers})
        if events or any(d.after > d.before for d in decisions.values()):
            changes = {
                name: {"from": d.before, "to": d.after, "explained": d.explained, "null_rank": null[name]}
                for name, d in decisions.items()
                if name in events or d.after > d.before
            }
            records.append(
                {"kind": "rank_event", "step": step, "action": action, "seconds": seconds, "layers": changes}
            )
        if removes_base:
            records.append({"kind": "base_removed", "step": step})
        return records
