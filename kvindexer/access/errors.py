"""Why a caller is not let in: the answers tell a wrong credential, a missing right and a fault of ours apart.

401 UnauthenticatedError    we don't know who this is: say so, or say it better
403 ForbiddenError          we know, and it is not allowed
503 UndecidedError          who decides can't be asked now: nobody is let in meanwhile
"""

from __future__ import annotations

from kvindexer.errors import RequestError


class UnauthenticatedError(RequestError):
    """Nobody that we know; never repeats what was presented."""

    status = 401

    def __init__(self, message: str, hint: str, *, presented: bool = True) -> None:
        self.presented = presented
        super().__init__("unauthenticated", message, hint)


class ForbiddenError(RequestError):
    """Somebody that we know, at a door that is shut to him."""

    status = 403

    def __init__(self, code: str, message: str, hint: str) -> None:
        super().__init__(code, message, hint)


class UndecidedError(RequestError):
    """Who decides about a credential has no answer now."""

    status = 503

    def __init__(self, message: str, hint: str = "try again later") -> None:
        super().__init__("auth_unavailable", message, hint)
