"""Bodies into typed structs; what can't be read becomes a RequestError that says where, not what.

Of the caller's own words an error repeats one at most: the name of a field that nobody knows, cut and escaped.
Malformed JSON or msgpack is 400, that of another shape 422.  Of an object's equal keys the last one counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache
from typing import Final, TypeVar

import msgspec
from msgspec.inspect import ListType, StructType, UnionType, type_info

from kvindexer.api.forms import JSON, Form
from kvindexer.errors import RequestError, TooLargeError

T = TypeVar("T", bound=msgspec.Struct)

MAX_MESSAGE: Final = 200
MAX_SHOWN_NAME: Final = 64
"""Longest piece of an unknown field's name that an error repeats, in characters."""
FURTHER_VALUES: Final = 100_000
"""Values that may stand elsewhere than in a list with a limit: fields, items, and (of JSON) commas in names."""

NESTED: Final = frozenset({"messages", "tools", "chat_template_kwargs"})
"""Fields that hold maps and lists in any depth."""

_MAP: Final = 0x80
_LIST: Final = 0x90
"""First bytes of short maps and lists in msgpack."""

_PLACE = re.compile(r" - at `(\$[\w.\[\]]*)`$")
_QUOTED = re.compile(r"`[^`]*`|'[^']*'")
_UNKNOWN_FIELD: Final = "Object contains unknown field `"
_LONGEST_PLACE: Final = 1000
"""Of characters: our structs are not that deep, and a name may have millions."""
_STEP = re.compile(r"\.(\w+)|\[")


def reader(kind: type[T], form: Form = JSON) -> Callable[[bytes], T]:
    """A function that reads bodies of this kind and form."""
    decode = msgspec.json.Decoder(kind).decode if form is JSON else msgspec.msgpack.Decoder(kind).decode
    malformed = f"malformed_{form.name.lower()}"
    one = f"send one {form.name} object, encoded as UTF-8"
    fields = ", ".join(kind.__struct_encode_fields__)

    def read(body: bytes) -> T:
        try:
            return decode(body)
        except msgspec.ValidationError as error:
            detail = str(error)
            raise (
                _unknown(detail, kind) if detail.startswith(_UNKNOWN_FIELD) else _misshapen(detail, fields)
            ) from None
        except RecursionError:
            raise RequestError(malformed, "the body is nested too deeply", "send one flat object") from None
        except ValueError as error:  # DecodeError, UnicodeDecodeError
            not_text = isinstance(error, UnicodeDecodeError)
            raise RequestError(
                malformed, f"the body is {'not UTF-8' if not_text else f'no {form.name}'}", one
            ) from None

    return read


def check_size(
    body: bytes, *limits: int, form: Form = JSON, settings: str = "max_prompt_tokens or max_candidates"
) -> None:
    """Refuse a body with more values than all its limits allow together before time is spent on decoding it.

    Every value of JSON but the first of a list comes with a comma; of msgpack the lists of the outermost object are
    looked at, whose items can't be lists; in `NESTED` fields each byte is taken for a value.  Raises TooLargeError.
    """
    most = sum(limits) + FURTHER_VALUES
    if len(body) <= most:  # a value takes a byte or more
        return
    values = body.count(b",") + 1 if form is JSON else _listed(body)
    if values > most:
        raise TooLargeError("values in the body", values, most, settings)


def _listed(body: bytes) -> int:
    """How many items the lists of a msgpack object have.  Raises RequestError if it has no names, or one twice."""
    try:
        fields = _read_fields(body)
    except (ValueError, RecursionError):
        fields = {}
    if len(fields) != _items(body, _MAP):  # of equal names only the last is here
        raise RequestError(
            "malformed_msgpack", "the body is no msgpack object with each name once", "send one msgpack object"
        )
    return sum(
        len(memoryview(raw)) if name in NESTED else _items(memoryview(raw), _LIST) for name, raw in fields.items()
    )


_read_fields = msgspec.msgpack.Decoder(dict[str, msgspec.Raw]).decode


def _items(packed: bytes | memoryview, short: int) -> int:
    """How many items a msgpack map or list has by its own account; 0 if it is none."""
    head = bytes(packed[:5])
    first = head[0] if head else 0
    if first & 0xF0 == short:
        return first & 0x0F
    width = {0xDC: 2, 0xDD: 4}.get(first - (2 if short == _MAP else 0), 0)
    return int.from_bytes(head[1 : 1 + width])


def unsigned(values: list[int], name: str) -> list[int]:
    """Hashes as unsigned 64-bit integers; negative ones are read as two's complement.  Raises RequestError."""
    lowest, highest = min(values, default=0), max(values, default=0)
    if lowest >= 0 and highest < 2**64:
        return values
    if lowest < -(2**63) or highest >= 2**64:
        raise RequestError(
            "invalid_request", f"{name}: a value has more than 64 bits", "hashes are 64-bit integers", status=422
        )
    return [value & (2**64 - 1) for value in values]


def _misshapen(detail: str, fields: str) -> RequestError:
    """The decoder's sentence, without the caller's own words in it."""
    place = _PLACE.search(detail)
    shown = detail[: place.start()] if place else detail.partition(" - at ")[0]
    if shown.startswith("Invalid"):
        shown = _QUOTED.sub("value", shown)
    if place:
        shown = f"{place.group(1)}: {shown}"
    return RequestError("invalid_request", shown[:MAX_MESSAGE], f"fields: {fields}", status=422)


def _unknown(detail: str, kind: type[msgspec.Struct]) -> RequestError:
    """The field that nobody knows, where it stands, and which there are in its place."""
    found = _PLACE.search(detail, max(len(_UNKNOWN_FIELD), len(detail) - _LONGEST_PLACE))
    place, end = (found.group(1), found.start()) if found else ("$", len(detail))
    name = detail[len(_UNKNOWN_FIELD) : min(end - 1, len(_UNKNOWN_FIELD) + MAX_SHOWN_NAME)]
    cut = "..." if len(_UNKNOWN_FIELD) + len(name) < end - 1 else ""
    shown = name if name.isprintable() else ascii(name)[1:-1]
    known = _known_at(kind, place)
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    message = f"the body has a field that this route does not know: {place}.{shown}{cut}"
    return RequestError("unknown_field", message, f"{hint}known fields: {', '.join(known)}", status=422)


@cache
def _fields_of(kind: type[msgspec.Struct]) -> StructType:
    found = type_info(kind)
    if not isinstance(found, StructType):
        raise TypeError(kind)
    return found


def _known_at(kind: type[msgspec.Struct], place: str) -> list[str]:
    """The fields of the struct that stands at this place of a body of this kind."""
    found = _fields_of(kind)
    for step in _STEP.finditer(place):
        inside = [field.type for field in found.fields if field.encode_name == step.group(1)]
        while inside and not isinstance(inside[0], StructType):
            match inside.pop(0):
                case UnionType(types=types):
                    inside.extend(types)
                case ListType(item_type=item):
                    inside.append(item)
        if inside and isinstance(inside[0], StructType):
            found = inside[0]
    return [field.encode_name for field in found.fields]
