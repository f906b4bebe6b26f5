"""Values of YAML or JSON files -> fields of a dataclass, checked.

The only check of types and ranges, for configurations, config.json and adapter_config.json: a field's annotation is its
type, its metadata (`limits`) the range. A bool is not a number, and text is neither: `"no"` would count as true.
"""

import dataclasses
import math
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from minilora.errors import UserError

T = TypeVar("T")


def limits(*, minimum: float | None = None, maximum: float | None = None, above: float | None = None) -> dict[str, Any]:
    """Metadata of a numeric field: `minimum` and `maximum` are allowed, `above` is not."""
    return {"minimum": minimum, "maximum": maximum, "above": above}


def coerce(value: Any, item: "dataclasses.Field[Any]") -> Any:
    """`value` as the field's type, within its limits; ValueError with what was expected."""
    coerced = _as_type(value, item.type)
    for value in _leaves(coerced):
        if isinstance(value, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
            raise ValueError("text without null characters and lone surrogates")
        if isinstance(value, int | float) and not isinstance(value, bool):
            _check_range(value, item.metadata)
    return coerced


def _leaves(value: Any) -> Iterator[Any]:
    """The scalars of a value: itself, a list's elements, or a mapping's keys and values."""
    if isinstance(value, dict):
        yield from value
        yield from value.values()
    elif isinstance(value, list | tuple):
        yield from value
    else:
        yield value


def _check_range(number: float, metadata: Mapping[str, Any]) -> None:
    minimum, maximum, above = (metadata.get(name) for name in ("minimum", "maximum", "above"))
    if minimum is not None and number < minimum:
        raise ValueError(f"{minimum} or more")
    if maximum is not None and number > maximum:
        raise ValueError(f"{maximum} or less")
    if above is not None and number <= above:
        raise ValueError(f"more than {above}")


def default_of(item: "dataclasses.Field[Any]") -> Any:
    """A field's default; `dataclasses.MISSING` if it is required."""
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def read_fields(kind: type[T], content: Mapping[str, Any], where: str, advice: str) -> T:
    """The dataclass `kind` from a JSON object with its fields and possibly others; null counts as absent.

    UserError, with `where` and the remedy `advice`, names every field that is missing, or of a wrong type or range.
    """
    values: dict[str, Any] = {}
    problems = []
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]
        value = content.get(item.name)
        value = default_of(item) if value is None else value
        if value is dataclasses.MISSING:
            problems.append(f"has no {item.name}")
            continue
        try:
            values[item.name] = coerce(value, item)
        except ValueError as error:
            problems.append(f"{item.name} is {value!r}, expected {error}")
    if problems:
        raise UserError(f"{where}: {', '.join(problems)}; {advice}")
    return kind(**values)


def takes_text(kind: Any) -> bool:
    """Whether a field of the type `kind` takes any text, not only a Literal."""
    return kind is str or (_is_union(kind) and str in get_args(kind))


def type_name(kind: Any) -> str:
    """The type's name in --help."""
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return ", ".join(arguments)
    if _is_union(kind):
        return " or ".join("null" if a is type(None) else type_name(a) for a in arguments)
    if get_origin(kind) is list:
        return f"list of {type_name(arguments[0])}"
    if get_origin(kind) is dict:
        return f"table of {type_name(arguments[1])}s"
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}[kind]


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _as_type(value: Any, kind: Any) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if _is_union(kind):
        if value is None and type(None) in arguments:
            return None
        words = [a for a in arguments if get_origin(a) is Literal]
        if any(value in get_args(a) for a in words if isinstance(value, str)):
            return value
        is_list = [a for a in arguments if get_origin(a) in (list, tuple)]
        if isinstance(value, list) and is_list:
            return _as_type(value, is_list[0])
        other = next(a for a in arguments if a is not type(None) and a not in [*is_list, *words])
        try:
            return _as_type(value, other)
        except ValueError as error:
            raise ValueError(", or ".join([str(error), *(", ".join(get_args(a)) for a in words)])) from None
    if origin is Literal:
        # YAML reads an unquoted `none` as text but `null` and `~` as None.
        if value in arguments and isinstance(value, str):
            return value
        raise ValueError(f"one of {', '.join(arguments)}")
    if origin in (list, tuple):
        if not isinstance(value, list):
            raise ValueError("a list, such as [a, b]")
        return origin(_as_type(item, arguments[0]) for item in value)
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError("a table, such as {name: 1}")
        if not all(isinstance(name, str) for name in value):
            raise ValueError("a table whose names are text (quote one that looks like a number or a yes/no word)")
        return {name: _as_type(item, arguments[1]) for name, item in value.items()}
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise ValueError("true or false")
    if kind in (int, float):
        return _as_number(value, kind)
    if isinstance(value, str):
        return value
    raise ValueError("text (quote it if it looks like a number or a yes/no word)")


def _as_number(value: Any, kind: Any) -> Any:
    expected = "a whole number" if kind is int else "a number"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(expected)
    if kind is int and isinstance(value, int):
        return value  # of any length: float() refuses more than 308 digits
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(expected) from None
    if not math.isfinite(number) or (kind is int and number != int(number)):
        raise ValueError(expected)
    return kind(number)
