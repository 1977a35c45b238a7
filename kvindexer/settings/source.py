"""A source as an operator writes it: a map of a YAML file, or the text of a `--source` flag.

Both come down to one mapping with the field names of `SourceSpec`.  The spellings of the open HTTP contract are
accepted too, so that a registration body can be pasted into a file.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from pydantic import TypeAdapter, ValidationError

from kvindexer.errors import SettingsError, UnknownNameError
from kvindexer.hiding import HIDDEN, short
from kvindexer.settings.wording import expected_of
from kvindexer.types import TIERS, SourceSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

ALIASES: Final = {
    "additionalsalt": "additional_salt",
    "dp_rank": "rank",
    "instance_id": "instance",
    "lora_name": "lora",
    "model_name": "model",
    "modelname": "model",
    "replay_endpoint": "replay",
    "tenant_id": "tenant",
}
TIER_NAMES: Final = tuple(tier.label for tier in TIERS)
MAX_ALIAS: Final = 1024
"""Longest alias of an instance."""

_CURVE_KEY: Final = re.compile(r"[0-9a-zA-Z.:+=^!/*?&<>()\[\]{}@%$#-]{40}")

_FIELDS: Final = tuple(SourceSpec.__dataclass_fields__)
_LISTS: Final = frozenset({"readers", "durable_tiers", "aliases"})
_SECRETS: Final = frozenset({"additional_salt"})
_ADAPTER: Final = TypeAdapter(SourceSpec)


def parse_source(text: str, key: str = "source") -> SourceSpec:
    """Read `instance=pod-a,model=m,block_size=16,endpoint=tcp://...`; lists are written `readers=pod-a+pod-b`."""
    values: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name:
            raise SettingsError(key, short(part), "name=value, separated by commas")
        if name in values:
            raise SettingsError(f"{key}.{name}", _shown(ALIASES.get(name, name), value), "each name once")
        listed = ALIASES.get(name, name) in _LISTS
        values[name] = tuple(value.split("+")) if listed and value else () if listed else value
    return source_of(values, key)


def source_of(values: Mapping[Any, Any], key: str) -> SourceSpec:
    """Build a source; `key` is how errors name the place, `sources[2]` for example."""
    known: dict[str, Any] = {}
    for name, value in values.items():
        field = ALIASES.get(name, name)
        if field not in _FIELDS:
            raise UnknownNameError(f"{key}.{name}", _FIELDS)
        if field in known:
            raise SettingsError(f"{key}.{name}", _shown(field, value), f"only one spelling of {field}")
        if isinstance(value, bool) and not field.startswith(("offload_connector", "clear_")):
            raise SettingsError(f"{key}.{name}", value, "no boolean")
        known[field] = value.lower() if field == "type" and isinstance(value, str) else value
    try:
        spec = _ADAPTER.validate_python(known)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        if first["type"] == "missing":
            raise SettingsError(f"{key}.{field}", None, "a value: it has no default") from None
        raise SettingsError(f"{key}.{field}", _shown(field, first["input"]), expected_of(first, field)) from None
    check_source(spec, key)
    return spec


def check_source(spec: SourceSpec, key: str) -> None:
    """Raise SettingsError for values that have the right type and make no sense."""
    ports = (("endpoint", spec.endpoint), ("replay", spec.replay))
    rules: list[tuple[str, object, bool, str]] = [
        *((name, getattr(spec, name), bool(getattr(spec, name)), "some text") for name in ("instance", "model")),
        ("block_size", spec.block_size, spec.block_size > 0, "greater than 0, in tokens"),
        ("rank", spec.rank, spec.rank >= 0, "0 or more"),
        ("offload_blocks_per_chunk", spec.offload_blocks_per_chunk, spec.offload_blocks_per_chunk > 0, "1 or more"),
        (
            "block_bytes",
            spec.block_bytes,
            spec.block_bytes is None or spec.block_bytes > 0,
            "greater than 0, in bytes",
        ),
        ("speculative_blocks", spec.speculative_blocks, spec.speculative_blocks >= 0, "0 or more"),
        *((name, url, url is None or _is_url(url), "a ZMQ address as tcp://host:port") for name, url in ports),
        (
            "curve_server_key",
            spec.curve_server_key,
            spec.curve_server_key is None or _CURVE_KEY.fullmatch(spec.curve_server_key) is not None,
            "the publisher's public CURVE key, 40 characters of Z85",
        ),
        ("tier", spec.tier, spec.tier is None or spec.tier in TIER_NAMES, f"one of {', '.join(TIER_NAMES)}"),
        (
            "durable_tiers",
            spec.durable_tiers,
            set(spec.durable_tiers) <= set(TIER_NAMES),
            f"names of tiers: {', '.join(TIER_NAMES)}",
        ),
        (
            "aliases",
            spec.aliases,
            all(0 < len(name) <= MAX_ALIAS for name in spec.aliases),
            "names, none of them empty",
        ),
    ]
    for name, value, good, expected in rules:
        if not good:
            raise SettingsError(f"{key}.{name}", short(value), expected)
    if spec.replay == spec.endpoint:
        raise SettingsError(f"{key}.replay", spec.replay, "another address than the endpoint's")


def _is_url(text: str) -> bool:
    """Whether ZMQ could dial this; a tcp address needs a host that isn't a wildcard, and a port."""
    scheme, separator, rest = text.partition("://")
    if not (scheme and separator and rest) or any(character.isspace() for character in text):
        return False
    if scheme != "tcp":
        return True
    host, _, port = rest.rpartition(":")
    return host not in ("", "*") and port.isascii() and port.isdigit() and 0 < int(port[:6]) <= 65535  # noqa: PLR2004


def _shown(field: str, value: object) -> object:
    """Hide the value of a field that may be confidential."""
    return HIDDEN if field in _SECRETS else short(value)
