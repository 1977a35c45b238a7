"""What pydantic finds wrong with a setting, as what would be right: in plain words, with unit and bounds.

Invariant: nothing here repeats the value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, get_args

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

_WHOLE: Final = frozenset({"int_type", "int_parsing", "int_parsing_size", "int_from_float"})
_NUMBER: Final = frozenset({"float_type", "float_parsing", "finite_number"})
_BOUND: Final = frozenset({"greater_than", "greater_than_equal", "less_than", "less_than_equal"})
_UNITS: Final = {"_s": "seconds", "_ms": "milliseconds", "_bytes": "bytes"}
_NAMES: Final = r"^[A-Za-z0-9._-]*$"
"""The pattern of `settings.values.Name`."""
_SAID: Final = {
    "dict_type": "a map, as `{name: value}`",
    "mapping_type": "a map, as `{name: value}`",
    "list_type": "a list, as `[one, two]`",
    "tuple_type": "a list, as `[one, two]`",
    "string_type": "text, in quotes if it looks like something else",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
}


def expected_of(error: ErrorDetails, name: str, field: FieldInfo | None = None) -> str:
    """What was expected; `field` is that of a whole setting, `name` what its unit is read from."""
    kind, context = error["type"], error.get("ctx", {})
    if kind in _WHOLE | _NUMBER | _BOUND:
        whole = kind in _WHOLE or (field is not None and int in (field.annotation, *get_args(field.annotation)))
        return _number(name, _bounds(context, field), whole=whole)
    if kind == "string_too_short" and context["min_length"] == 1:
        return "some text"
    if kind == "string_too_long":
        return f"at most {context['max_length']} characters"
    if kind == "string_pattern_mismatch" and context["pattern"] == _NAMES:
        return "letters, digits and . _ - only"
    return _SAID.get(kind) or error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")


def _bounds(context: Mapping[str, Any], field: FieldInfo | None) -> dict[str, float]:
    """Those that the error names, and all those of the field."""
    found = {name: context[name] for name in ("gt", "ge", "lt", "le") if name in context}
    for limit in field.metadata if field is not None else ():
        match limit:
            case Gt(gt=bound):
                found["gt"] = bound
            case Ge(ge=bound):
                found["ge"] = bound
            case Lt(lt=bound):
                found["lt"] = bound
            case Le(le=bound):
                found["le"] = bound
    return found


def _number(name: str, bounds: Mapping[str, float], *, whole: bool) -> str:
    unit = next((unit for ending, unit in _UNITS.items() if name.endswith(ending)), "")
    noun = f"a{' whole' if whole else ''} number{' of ' if unit else ''}{unit}"
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    if whole and bounds.get("gt") == 0:
        bounds = {**{name: bound for name, bound in bounds.items() if name != "gt"}, "ge": 1}
    if "ge" in bounds and "le" in bounds:
        return f"{noun} from {_plain(bounds['ge'])} to {_plain(bounds['le'])}"
    said = [f"{words[each]} {_plain(bounds[each])}" for each in words if each in bounds]
    return f"{noun} {' and '.join(said)}" if said else noun


def _plain(bound: float) -> str:
    return str(int(bound)) if bound == int(bound) else str(bound)
