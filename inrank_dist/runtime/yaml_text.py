"""Reads YAML written by users, strictly and within limits.

PyYAML follows YAML 1.1, where ``1e-3`` is a string and the last of several equal keys silently wins. With aliases, a
few lines can stand for billions of values, or for a value that contains itself.
"""

import math
import re
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError

MAX_BYTES = 1 << 20
MAX_DEPTH = 50
MAX_VALUES = 100_000
"""Per file, counting values repeated through aliases."""

_EXPONENT = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")


class _Bounded:
    """A PyYAML composer that enforces the limits before any value is constructed."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        # PyYAML's time is quadratic in the depth, and it recurses.
        if self._depth > MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {MAX_DEPTH} deep")
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)  # type: ignore[misc]
        self._depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()  # type: ignore[misc]
        if node is not None and _count(node, {}) > MAX_VALUES:
            raise yaml.YAMLError(f"with its aliases it stands for more than {MAX_VALUES} values")
        return node


class _Loader(_Bounded, yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is written twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class _TextLoader(_Bounded, yaml.BaseLoader):
    """Keeps every scalar a string, such as 1 and true in a list of strings."""


class _Dumper(yaml.SafeDumper):
    pass


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def _count(node: yaml.Node, counted: dict[int, int | None]) -> int:
    """Number of values that a node stands for.

    Args:
        counted: counts of visited nodes by id; None while a node is being counted.
    """
    if id(node) in counted:
        count = counted[id(node)]
        if count is None:
            raise yaml.MarkedYAMLError(problem="a value holds itself", problem_mark=node.start_mark)
        return count
    counted[id(node)] = None
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [each for pair in node.value for each in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    counted[id(node)] = count = 1 + sum(_count(child, counted) for child in children)
    return count


def load(text: str, *, as_text: bool = False) -> Any:
    """Parse a YAML text.

    Args:
        as_text: whether to keep every scalar a string.

    Raises:
        ValueError: the text is not valid YAML or exceeds a limit; the message says where and why.
    """
    try:
        return yaml.load(text, _TextLoader if as_text else _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"is not valid YAML{place}: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2020-13-01
        raise ValueError(f"is not valid YAML: {error}") from None


def read(file: Path) -> Any:
    """Read a YAML file.

    Raises:
        UserError: the file cannot be read, is too large, or is not valid YAML.
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(f"{file} is larger than {MAX_BYTES} bytes; write the path of a file of settings")
        return load(content.decode("utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); write the path of a YAML file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start}); write the path of a YAML file") from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{file} {error}") from None


def dump(value: Any) -> str:
    """Write YAML that ``load`` reads back. ASCII, so as not to depend on the locale; PyYAML misreads a raw U+0085."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def shown(value: Any) -> str:
    """Format a value as YAML on one line."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=math.inf, allow_unicode=True)
    return " ".join(text.removesuffix("...\n").split())
