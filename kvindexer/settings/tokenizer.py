"""A model's tokenizer as an operator writes it: `{path: DIR}` or `{engines: [URL, ...]}`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final
from urllib.parse import urlsplit

from kvindexer.errors import SettingsError, UnknownNameError
from kvindexer.hiding import short

MAX_ENGINES: Final = 1024


@dataclass(frozen=True)
class TokenizerSpec:
    """Where texts of a model become tokens: in this process, or at the engines that serve it."""

    path: str = ""
    chat_template: str = ""
    engines: tuple[str, ...] = ()
    model: str = ""


_FIELDS: Final = tuple(field.name for field in fields(TokenizerSpec))


def read_tokenizers(value: object) -> Mapping[str, TokenizerSpec]:
    """The setting `tokenizers`, a map by model.  Raises SettingsError that names model and field."""
    if not isinstance(value, Mapping):
        raise SettingsError("tokenizers", short(value), "a map of models, each with path or engines")
    return {_model(model): _tokenizer(spec, key_of(model)) for model, spec in value.items()}


def key_of(model: object) -> str:
    """How errors name a model's tokenizer."""
    shown = str(short(model))
    return f"tokenizers.{shown if shown.isprintable() else ascii(shown)}"


def _model(model: object) -> str:
    if not isinstance(model, str) or not model:
        raise SettingsError(
            "tokenizers", short(model), "names of models as keys, in quotes if they look like numbers"
        )
    return model


def _tokenizer(spec: object, key: str) -> TokenizerSpec:
    if isinstance(spec, TokenizerSpec):
        return spec
    if not isinstance(spec, Mapping):
        raise SettingsError(key, short(spec), "a map with path or engines")
    for name in spec:
        if name not in _FIELDS:
            raise UnknownNameError(f"{key}.{short(name)}", _FIELDS)
    path, chat_template = (_text(spec, name, key) for name in ("path", "chat_template"))
    engines = _engines(spec.get("engines", ()), key)
    if bool(path) == bool(engines):
        raise SettingsError(key, "both" if path else "neither", "either path or engines")
    if chat_template and engines:
        raise SettingsError(f"{key}.chat_template", chat_template, "nothing: engines have their own")
    model = _text(spec, "model", key)
    if model and path:
        raise SettingsError(f"{key}.model", model, "nothing: it is the name that engines know")
    return TokenizerSpec(path, chat_template, engines, model)


def _text(spec: Mapping[Any, Any], name: str, key: str) -> str:
    value = spec.get(name, "")
    if not isinstance(value, str) or not value.isprintable():
        raise SettingsError(f"{key}.{name}", short(value), "text")
    return value


def _engines(value: object, key: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or len(value) > MAX_ENGINES or not all(map(is_http, value)):
        raise SettingsError(f"{key}.engines", short(value), "a list of addresses as http://host:port")
    return tuple(dict.fromkeys(value))


def is_http(url: object) -> bool:
    """Whether this is the address of an HTTP server, without a password in it."""
    if not isinstance(url, str) or not url.isascii() or not url.isprintable() or " " in url:
        return False
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    plain = not (parts.username or parts.password or parts.query or parts.fragment)
    return parts.scheme in ("http", "https") and bool(parts.hostname) and plain and port != 0
