"""The README.md of an exported model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .weights import Kept


@dataclass(frozen=True)
class CardLayer:
    """A low-rank layer: ``(out, in)``, its rank in the run, and the rank found and the null rank if they are known."""

    shape: tuple[int, int]
    rank: int
    found: int | None
    null_rank: int | None


@dataclass(frozen=True)
class Card:
    """What a model card says.

    Attributes:
        name: name of the model.
        architecture: such as ``gpt2``.
        mode: ``lowrank.mode`` of the run.
        facts: name -> value.
        sentences: what can and cannot be concluded from the run.
        layers: by name.
        kept: results of a further truncation, by layer name.
        start: the token that starts a document.
        code: file of the folder that transformers needs to execute, or None.
    """

    name: str
    architecture: str
    mode: str
    facts: Mapping[str, str]
    sentences: Sequence[str]
    layers: Mapping[str, CardLayer]
    kept: Mapping[str, Kept]
    start: str
    for_transformers: bool
    code: str | None = None

    def text(self) -> str:
        """Return the card in Markdown."""
        tags = "inrank, low-rank" + ", custom_code" * (self.code is not None)
        lines = ["---", "pipeline_tag: text-generation", f"tags: [{tags}]"]
        lines += ["library_name: transformers"] if self.for_transformers else []
        lines += ["---", "", f"# {self.name}", ""]
        lines += [f"A {self.architecture} language model, trained by inrank_dist with `lowrank.mode: {self.mode}`.", ""]
        if self.code is not None:
            lines += [f"`transformers` has no class for this model; its code is `{self.code}`.", ""]
            lines += ["Write `trust_remote_code=True` in `from_pretrained` and `pipeline`.", ""]
        lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in self.facts.items()), ""]
        lines += [f"In training, documents started after `{self.start}`. The tokenizer does not add it.", ""]
        lines += [f"- {sentence}" for sentence in self.sentences] + [""]
        if self.layers:
            lines += ["## Ranks", ""]
            lines += [
                "Found is the rank that the rule chose, before rounding or a budget. The null rank is what the same"
            ]
            lines += ["rule finds in factors that were never trained.", ""]
            lines += self._table()
        return "\n".join(lines).rstrip() + "\n"

    def _table(self) -> list[str]:
        headings = ["layer", "shape", "rank", "found", "null rank"] + (
            ["exported rank", "discarded"] if self.kept else []
        )
        lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
        for name, layer in self.layers.items():
            known = ["-" if rank is None else str(rank) for rank in (layer.found, layer.null_rank)]
            cells = [name, f"{layer.shape[0]} x {layer.shape[1]}", str(layer.rank), *known]
            if self.kept:
                kept = self.kept[name]
                cells += [str(kept.rank), f"{kept.share:.2%}"]
            lines.append("| " + " | ".join(cells) + " |")
        return lines
