"""Values of the types that a dataclass declares, from YAML or from whoever calls it."""

import dataclasses
import difflib
import types
import typing
from typing import Any, Literal

from ddecode.arguments import LARGEST_SEED, check_finite, check_whole, shown


def settle(config: Any, where: str) -> None:
    """Bring the fields of a frozen dataclass to the types that it declares, lists to tuples; for `__post_init__`.

    Raises:
        ValueError: one is of another type; it is named as the group `where` of a YAML file has it.
    """
    dot = f"{where}." if where else ""
    for name, kind in typing.get_type_hints(type(config)).items():
        object.__setattr__(config, name, build(kind, getattr(config, name), dot + name))


def build(kind: Any, value: Any, where: str) -> Any:
    """Turn parsed YAML into `kind`: a dataclass, a scalar, a tuple, a Literal or an optional of those.

    Raises:
        ValueError: it is none; the message begins with `where`.
    """
    if dataclasses.is_dataclass(kind):
        return build_dataclass(kind, value, where)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        mapping = isinstance(value, dict) and next((a for a in args if typing.get_origin(a) is dict), None)
        return build(mapping or next(a for a in args if a is not type(None)), value, where)
    if origin is Literal:
        if value is False and "no" in args:  # YAML 1.1 reads a bare `no` as false
            value = "no"
        if value in args:
            return value
        raise ValueError(f"{where} must be one of {', '.join(map(str, args))}, got {shown(value)}")
    if origin is tuple:
        if not isinstance(value, list | tuple) or (args[-1] is not ... and len(args) != len(value)):
            raise ValueError(f"{where} must be a list, got {shown(value)}")
        return tuple(build(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if kind is float and isinstance(value, str):
        value = as_number(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        check_finite(where, value)
        return float(value)
    if origin is dict and args[1] is not Any and isinstance(value, dict):
        return {build(args[0], k, f"{where} key"): build(args[1], v, f"{where}.{k}") for k, v in value.items()}
    expected = dict if origin is dict else kind
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise ValueError(f"{where} must be {expected.__name__}, got {shown(value)}")
    if kind is int:
        check_whole(where, value, -LARGEST_SEED, LARGEST_SEED)
    return value


def as_number(text: str) -> float | str:
    """YAML 1.1 reads `1e-3` as text."""
    try:
        return float(text)
    except ValueError:
        return text


def build_dataclass(kind: Any, value: Any, where: str) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'the config'} must be a group of keys, got {shown(value)}")
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    dot = f"{where}." if where else ""
    for key in value:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1)
            hint = f"did you mean {dot}{near[0]}?" if near else f"it knows {', '.join(names)}"
            raise ValueError(f"unknown config key {dot}{key}; {hint}")
    for f in dataclasses.fields(kind):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in value:
            raise ValueError(f"config key {dot}{f.name} is missing")
    return kind(**{key: build(hints[key], v, f"{dot}{key}") for key, v in value.items()})
