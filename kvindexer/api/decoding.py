"""JSON bodies into typed structs; what can't be read becomes a RequestError that says where, not what.

Malformed JSON is 400, JSON of another shape 422.  Of an object's equal keys the last one counts.  The content type is
not looked at: curl's default is fine.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, TypeVar

import msgspec

from kvindexer.errors import RequestError, TooLargeError

T = TypeVar("T", bound=msgspec.Struct)

MAX_MESSAGE: Final = 200
FURTHER_VALUES: Final = 100_000
"""Commas that may stand elsewhere than in a list with a limit: between fields, items and in names."""

_PLACE = re.compile(r" - at `(\$[\w.\[\]]*)`$")
_QUOTED = re.compile(r"`[^`]*`|'[^']*'")
_UNKNOWN_FIELD: Final = "Object contains unknown field"


def reader(kind: type[T]) -> Callable[[bytes], T]:
    """A function that reads bodies of this kind."""
    decode = msgspec.json.Decoder(kind).decode
    fields = ", ".join(kind.__struct_encode_fields__)

    def read(body: bytes) -> T:
        try:
            return decode(body)
        except msgspec.ValidationError as error:
            raise _misshapen(str(error), fields) from None
        except RecursionError:
            raise RequestError("malformed_json", "the body is nested too deeply", "send one flat object") from None
        except ValueError as error:  # DecodeError, UnicodeDecodeError
            message = "the body is not UTF-8" if isinstance(error, UnicodeDecodeError) else "the body is no JSON"
            raise RequestError("malformed_json", message, "send one JSON object, encoded as UTF-8") from None

    return read


def check_size(body: bytes, *limits: int) -> None:
    """Refuse a body with more values than all its limits allow together before time is spent on decoding it.

    Every value but the first of a list comes with a comma.  Raises TooLargeError.
    """
    most = sum(limits) + FURTHER_VALUES
    if len(body) > most:
        values = body.count(b",") + 1
        if values > most:
            raise TooLargeError("values in the body", values, most, "max_prompt_tokens or max_candidates")


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
    if detail.startswith(_UNKNOWN_FIELD):
        message = "the body has a field that this route does not know"
        return RequestError("unknown_field", message, f"known fields: {fields}", status=422)
    place = _PLACE.search(detail)
    shown = detail[: place.start()] if place else detail.partition(" - at ")[0]
    if shown.startswith("Invalid"):
        shown = _QUOTED.sub("value", shown)
    if place:
        shown = f"{place.group(1)}: {shown}"
    return RequestError("invalid_request", shown[:MAX_MESSAGE], f"fields: {fields}", status=422)
