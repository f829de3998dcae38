"""What the pages of the project say: their commands, code blocks, links and tables of settings.

``python tests/pages.py`` writes the tables of settings of configs/README.md anew.
"""

import dataclasses
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    "launch/README.md",
    "configs/README.md",
    "inrank_dist/README.md",
    "inrank_dist/bench/README.md",
    "inrank_dist/theory/README.md",
    "CONTRIBUTING.md",
]
SETTINGS_PAGE, SETTINGS_BEGIN = "configs/README.md", "\n### run\n"

PROGRAMS = (
    "inrank ",
    "launch/",
    "python ",
    "python3 ",
    ".venv/bin/",
    "docker ",
    "pip ",
    "tensorboard ",
    "torchrun ",
    "sbatch ",
    "scancel ",
    "lm_eval ",
)
"""What an inline code span that is a command begins with; ``sh`` blocks hold commands only."""

PLACEHOLDERS = {
    "FILE": "my.yaml",
    "DIR": "runs/quickstart",
    "RUN": "runs/quickstart",
    "FOLDER": "my-folder",
    "TEXT": "text",
    "NAME": "incremental",
    "N": "2",
    "JOB": "1",
    "COMMIT": "HEAD",
    "COMMAND": "train",
}


class Block(NamedTuple):
    """A fenced code block."""

    page: str
    line: int
    language: str
    text: str


class Command(NamedTuple):
    """A command of a page, without its comment; placeholders such as FILE are replaced."""

    page: str
    line: int
    text: str
    inline: bool
    """Whether it is a code span in a sentence or table."""

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)

    def __str__(self) -> str:
        return f"{self.page}:{self.line} {self.text}"


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page."""
    text = read(page)
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(page, text[: found.start()].count("\n") + 2, found[1], found[2])


def own_configs() -> dict[str, str]:
    """File name -> text of the configurations of a user in configs/README.md, which commands of all pages take."""
    yaml = [block.text for block in blocks(SETTINGS_PAGE) if block.language == "yaml"]
    return {f"{name[1]}.yaml": text for text in yaml if (name := re.search(r"^run: {name: ([\w-]+)}", text, re.M))}


def prose(page: str) -> str:
    """The page with its fenced blocks blanked, so that lines keep their numbers."""
    blank = re.compile(r"^```\w*\n.*?^```$", re.MULTILINE | re.DOTALL)
    return blank.sub(lambda found: "\n" * found[0].count("\n"), read(page))


def commands(page: str) -> Iterator[Command]:
    """Every command of the ``sh`` blocks, and every inline code span that is one."""
    for block in blocks(page):
        if block.language == "sh":
            for number, line in enumerate(block.text.splitlines()):
                if text := re.sub(r"(^|\s+)#\s.*", "", line).strip():
                    yield Command(page, block.line + number, filled(text), False)
    text = prose(page)
    for found in re.finditer(r"(?<!`)`([^`]+)`(?!`)", text):
        span = " ".join(found[1].replace("\\|", "|").split())
        plain = re.sub(r"^([A-Z_]+=\S+ )+", "", span)
        if plain.startswith(PROGRAMS) and (" " in plain or plain.endswith(".sh")):
            yield Command(page, text[: found.start()].count("\n") + 1, filled(span), True)


def filled(text: str) -> str:
    """The command with ``[optional parts]`` taken out of their brackets and placeholders replaced."""
    text = re.sub(r"\[(-[^]]*)\]", r"\1", text).replace("study FILE", "study configs/studies/quickstart.yaml")
    text = text.replace("DIR DIR", "runs/quickstart runs/my")
    return " ".join(PLACEHOLDERS.get(word, word) for word in text.split(" "))


def python_block(marker: str) -> str:
    """The Python block of all pages that contains a text."""
    (found,) = [b.text for page in PAGES for b in blocks(page) if b.language == "python" and marker in b.text]
    return found


def slug(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    kept = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower())
    return kept.replace(" ", "-")


def anchors(page: str) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)}


def links(page: str) -> Iterator[tuple[int, str]]:
    """Line and target of every link and image."""
    text = prose(page)
    for found in re.finditer(r"(?:\]\(|(?:src|srcset)=\")([^)\"\s]+)[)\"]", text):
        yield text[: found.start()].count("\n") + 1, found[1]


def settings_tables() -> str:
    """A table for each section: setting, default, values, description."""
    from inrank_dist.commands.settings_help import _descriptions
    from inrank_dist.config import SECTIONS, SETTINGS, default_of, is_required, key_of
    from inrank_dist.runtime.setting_types import in_words
    from inrank_dist.runtime.yaml_text import shown

    parts = []
    for section, cls in SECTIONS.items():
        descriptions = _descriptions(cls)
        lines = [f"### {section}", "", "| setting | default | value | meaning |", "|---|---|---|---|"]
        for key in dataclasses.fields(cls):
            dotted = f"{section}.{key_of(key)}"
            required = is_required(key, {})
            default = "required" if required else f"`{shown(default_of(key))}`"
            cells = (f"`{dotted}`", default, in_words(SETTINGS[dotted], required=required), descriptions[key.name])
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    page = ROOT / SETTINGS_PAGE
    written, begin, _ = page.read_text(encoding="utf-8").partition(SETTINGS_BEGIN)
    assert begin or "## All settings" in written
    page.write_text(written.rstrip("\n") + "\n\n" + settings_tables(), encoding="utf-8")
