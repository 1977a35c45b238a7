"""Every error that kvindexer raises on purpose.

KvIndexerError
├── SettingsError            a flag, variable or file says something unusable: name, value, what was expected
│   └── UnknownNameError         it names a setting, or a field of one, that there is not
├── WireError                bytes of a publisher that are no batch or no event of any dialect
├── RequestError             a caller of the HTTP API asked for something that can't be (has an HTTP status)
│   ├── UnknownModelError        404
│   ├── ConflictError            409: contradicts what is registered
│   ├── TooLargeError            413: beyond a limit that a setting names
│   ├── NoTokenizerError         422: a prompt as text, and nothing that makes tokens of this model's texts
│   ├── PromptRefusedError       422: the model's tokenizer or chat template can't make tokens of this prompt
│   └── TokenizerFailedError     503: there is a tokenizer, and it has no answer now
├── StoreError               Redis could not be asked, or refused; has a reason and a hint
├── TraceError               a recording or trace file that can't be read: file, line and what was expected
└── client.ClientError       asking a service from Python went wrong; its tree stands in `client/errors`

A `WireError` is the peer's fault, a `RequestError` the caller's, a `SettingsError` the operator's.
A `StoreError` is never a caller's trouble: queries are answered from memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Final

_USER: Final = re.compile(r"(?<=://)[^/@\s]+@")
_ALIKE: Final = 0.7
"""How alike names must be for one to be taken for a slip of the other."""
_LISTED: Final = 32
"""More names than that are no help in a line."""


def without_user(text: str) -> str:
    """The text, with the user and the password of every address in it hidden."""
    return _USER.sub("***@", text)


class KvIndexerError(Exception):
    """Base of all errors raised on purpose."""


class SettingsError(KvIndexerError):
    """A setting can't be used; `origin` is where it was given, as far as that is known."""

    def __init__(self, key: str, value: object, expected: str, origin: str = "") -> None:
        self.key = key
        self.value = without_user(value) if isinstance(value, str) else value
        self.expected = expected
        self.origin = origin
        shown = key if key.isprintable() else ascii(key)[1:-1]  # names in maps are the operator's
        super().__init__(f"setting {shown}: {self.problem}")

    @property
    def problem(self) -> str:
        """The error without the setting's name."""
        wrong = "nothing is set" if self.value is None else f"{self.value!r} is not usable"
        return f"{wrong}, expected {self.expected}{self._given}"

    @property
    def _given(self) -> str:
        return f" ({self.origin})" if self.origin else ""

    def at(self, origin: str) -> SettingsError:
        """The same error, with the place where the value was given."""
        return SettingsError(self.key, self.value, self.expected, origin)


class UnknownNameError(SettingsError):
    """There is no such setting, or field of one.  Its value is in no message: it may be a misspelled secret."""

    def __init__(self, key: str, known: Iterable[str], what: str = "field", origin: str = "") -> None:
        self._known, self._what = tuple(known), what
        super().__init__(key, None, f"a known {what}", origin)

    @property
    def problem(self) -> str:
        """The error without the name."""
        name = self.key.rpartition(".")[2].lower().replace("-", "_")
        near = get_close_matches(name, self._known, n=1, cutoff=_ALIKE)
        if near:
            way = f"; did you mean {near[0]}?"
        else:
            many = len(self._known) > _LISTED
            way = "; docs/settings.md lists them" if many else f"; known are {', '.join(self._known)}"
        return f"there is no such {self._what}{way}{self._given}"

    def at(self, origin: str) -> SettingsError:
        """See `SettingsError.at`."""
        return UnknownNameError(self.key, self._known, self._what, origin)


class WireError(KvIndexerError):
    """A publisher's bytes can't be read; `reason` is a short fixed word for counters."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}" if detail else reason)


class RequestError(KvIndexerError):
    """A request that can't be answered; becomes the one JSON error shape."""

    status = 400

    def __init__(self, code: str, message: str, hint: str = "", *, status: int | None = None) -> None:
        self.code = code
        self.message = message
        self.hint = hint
        if status is not None:
            self.status = status
        super().__init__(message)


class UnknownModelError(RequestError):
    """No registered source serves the model."""

    status = 404

    def __init__(self, model: str, known: tuple[str, ...]) -> None:
        listed = ", ".join(known[:8]) or "none registered yet"
        super().__init__("unknown_model", f"no source of model {model!r} is registered", f"known: {listed}")


class ConflictError(RequestError):
    """The registration contradicts an existing one."""

    status = 409

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__("conflict", message, hint)


class TooLargeError(RequestError):
    """Beyond a limit; the hint names the setting that moves it."""

    status = 413

    def __init__(self, what: str, size: int, limit: int, setting: str) -> None:
        super().__init__(
            "too_large",
            f"{what}: {size} is over the limit of {limit}",
            f"send less, or raise {setting}",
        )


class NoTokenizerError(RequestError):
    """Texts of the model can't become tokens."""

    status = 422

    def __init__(self, model: str) -> None:
        super().__init__(
            "no_tokenizer",
            f"there is no tokenizer for texts of model {model!r}",
            "name the model in the setting tokenizers, or send tokens",
        )


class PromptRefusedError(RequestError):
    """This prompt has no tokens; `why` never repeats a piece of it."""

    status = 422

    def __init__(self, why: str, hint: str = "send what the model's own server would take") -> None:
        super().__init__("prompt_refused", why, hint)


class TokenizerFailedError(RequestError):
    """No answer, or none that can be believed; `reason` is a short fixed word for counters."""

    status = 503

    def __init__(self, reason: str, why: str, hint: str = "try again, or send tokens") -> None:
        self.reason = reason
        super().__init__("tokenizer_failed", why, hint)


class StoreError(KvIndexerError):
    """The store can't be used now; `reason` is a short fixed word for counters, `hint` says what to change."""

    def __init__(self, reason: str, message: str, hint: str = "") -> None:
        self.reason = reason
        self.message = message
        self.hint = hint
        super().__init__(f"{reason}: {message}" + (f"; {hint}" if hint else ""))


class TraceError(KvIndexerError):
    """A recording or trace file can't be read."""

    def __init__(self, file: str, line: int, expected: str) -> None:
        self.file = file
        self.line = line
        self.expected = expected
        super().__init__(f"{file}:{line}: expected {expected}")
