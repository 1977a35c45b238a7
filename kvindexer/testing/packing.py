"""The one place where the fake encodes msgpack.

With the msgpack package, so that a decoder under test never reads what its own library wrote.
"""

from __future__ import annotations

from typing import Any

import msgpack  # type: ignore[import-untyped]


def pack(value: Any) -> bytes:
    """Encode as msgpack; bytes become bin, tuples arrays."""
    return bytes(msgpack.packb(value, use_bin_type=True))
