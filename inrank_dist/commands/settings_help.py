"""The part of ``--help`` that lists all settings."""

import argparse
import ast
import dataclasses
import functools
import inspect

from ..config import SECTIONS, SETTINGS, default_of, is_required, key_of
from ..runtime.setting_types import in_words
from ..runtime.yaml_text import shown


@functools.cache  # takes a tenth of a second
def settings_help() -> str:
    """All settings by section, with their description, default and type."""
    parser = argparse.ArgumentParser(add_help=False, usage=argparse.SUPPRESS)
    for section, cls in SECTIONS.items():
        group = parser.add_argument_group(section)
        descriptions = _descriptions(cls)
        for key in dataclasses.fields(cls):
            dotted = f"{section}.{key_of(key)}"
            default = default_of(key)
            required = is_required(key, {})
            standard = "required" if required else f"default {shown(default)}"
            text = f"{descriptions[key.name]} ({standard}; {in_words(SETTINGS[dotted], required=required)})"
            group.add_argument(f"--{dotted}", metavar="VALUE", help=text.replace("%", "%%"))
    return parser.format_help()


def _descriptions(section: type) -> dict[str, str]:
    """The docstrings below the fields of a dataclass, which Python discards."""
    (tree,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(tree, ast.ClassDef)
    texts = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            texts[field.target.id] = " ".join(str(below.value.value).split())
    return texts
