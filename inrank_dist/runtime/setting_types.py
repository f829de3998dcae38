"""Types of settings: int, float, bool, str, Literal of texts, names of a registry, lists, dict, any of them or None."""

import sys
import types
import typing
from typing import Annotated, Any, Literal

from . import yaml_text


def parse(text: str, expected: Any) -> Any:
    """The value that a command-line word stands for; the word itself where it stands for none."""
    accepted = alternatives(expected)
    if text == "null" and type(None) in accepted:
        return None
    if all(each in (str, type(None)) or typing.get_origin(each) in (Literal, Annotated) for each in accepted):
        return text
    # In a list of texts, 1 and true are texts.
    is_list = list[str] in accepted
    try:
        return yaml_text.load(text, as_text=is_list) if text.strip() else text
    except ValueError:
        return text


def fits(value: Any, expected: Any) -> bool:
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is Annotated:
        return isinstance(value, str) and value in expected.__metadata__[0].names()
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is list:
        return isinstance(value, list) and all(fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)
    if len(alternatives(expected)) > 1:
        return any(fits(value, argument) for argument in arguments)
    if expected in (int, float) and isinstance(value, bool):
        return False
    if expected is float:
        return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    return isinstance(value, expected) and value != ""


def as_list(value: Any, expected: Any) -> str | None:
    """The list that stands for a value without its brackets, as it is written; None if none does."""
    if isinstance(value, list | dict) or not any(typing.get_origin(each) is list for each in alternatives(expected)):
        return None
    text = f"[{value if isinstance(value, str) else yaml_text.shown(value)}]"
    items = parse(text, expected)
    return text if isinstance(items, list) and items and fits(items, expected) else None


def alternatives(expected: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(expected) in (typing.Union, types.UnionType)
    return typing.get_args(expected) if is_union else (expected,)


def in_words(expected: Any, *, required: bool = False) -> str:
    """What to write for a setting of this type; null is no value of a required one."""
    if required:
        return " or ".join(in_words(each) for each in alternatives(expected) if each is not type(None))
    if typing.get_origin(expected) is Annotated:
        return "one of " + ", ".join(expected.__metadata__[0].names())
    if typing.get_origin(expected) is Literal:
        return "one of " + ", ".join(typing.get_args(expected))
    if typing.get_origin(expected) is list and typing.get_origin(typing.get_args(expected)[0]) is dict:
        return "a list such as [{a: 1}, {a: 2}]"
    if typing.get_origin(expected) is list:
        (item,) = typing.get_args(expected)
        if typing.get_origin(item) is Annotated:
            names = list(item.__metadata__[0].names())
            return f"a list of {', '.join(names)}, such as [{names[0]}]"
        return "a list such as [1,2]" if item is int else "a list such as [a,b]"
    if typing.get_origin(expected) is dict:
        return "keys and values such as {a: 1}"
    if len(alternatives(expected)) > 1:
        return " or ".join(in_words(each) for each in alternatives(expected))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}[expected]
