"""Who is asking, and what that means for the tenant and the cache salt of a question.

    Identity ─► tenant_of(named)      its own tenant, or an error; of a caller that is bound to none, what it names
             ─► salt_of(given)        a cache salt of its own scope, or an error
             ─► sees(tenant)          whether rows of this tenant may be in its answers

The identity of a request stands in a context variable, since every request is a task of its own: a route asks for
the tenant in one call, whatever layers lie between.  While nobody has to say who he is there is none, and the three
functions change nothing.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final, Literal

from kvindexer.errors import RequestError

Role = Literal["query", "register", "admin"]
ROLES: Final[tuple[Role, ...]] = ("query", "register", "admin")
SALT_SEPARATOR: Final = ":"
FORBIDDEN: Final = 403


@dataclass(frozen=True, slots=True)
class Grant:
    """What an operator allows a caller."""

    roles: frozenset[Role] = frozenset()
    tenant: str | None = None
    """The only tenant whose blocks it may ask about, and register sources for; None: any."""
    cache_salt: str | None = field(default=None, repr=False)
    """Its prompts carry this cache salt, or one that begins with it and a colon; None: any."""

    def may(self, role: Role | None) -> bool:
        """Whether a door that asks for this role is open to it; None: for everybody who is known."""
        return role is None or role in self.roles or "admin" in self.roles


@dataclass(frozen=True, slots=True)
class Identity:
    """A caller: its name, for logs and limits, and what it may do."""

    name: str
    grant: Grant


ANONYMOUS: Final = Identity("anonymous", Grant())
"""Somebody who has not said who he is, at a door that is open to everybody."""

_CALLER: ContextVar[Identity | None] = ContextVar("kvindexer_caller", default=None)

caller = _CALLER.get
"""The identity of the request that is being answered; None: nobody has to say who he is."""

enter = _CALLER.set
"""From here on the request that is being answered is this caller's."""


def tenant_of(named: str | None) -> str | None:
    """The tenant that a request is about: that of its caller, or what it names.  Raises RequestError."""
    asking = _CALLER.get()
    if asking is None or asking.grant.tenant is None:
        return named or None
    if named and named != asking.grant.tenant:
        raise RequestError(
            "other_tenant",
            "this caller may not ask about another tenant",
            "leave the tenant away: the caller has one of its own",
            status=FORBIDDEN,
        )
    return asking.grant.tenant


def salt_of(given: str | None) -> str | None:
    """The cache salt that a prompt of the caller has.  Raises RequestError."""
    asking = _CALLER.get()
    if asking is None or asking.grant.cache_salt is None:
        return given
    scope = asking.grant.cache_salt
    if not given:
        return scope
    if given != scope and not given.startswith(scope + SALT_SEPARATOR):
        raise RequestError(
            "other_cache_salt",
            "the cache salt is outside this caller's scope",
            "leave it away, or begin it with the caller's own salt and a colon",
            status=FORBIDDEN,
        )
    return given


def no_keys() -> None:
    """Keys and hashes say nothing of the salt that they were made with: raise RequestError if that matters."""
    asking = _CALLER.get()
    if asking is not None and asking.grant.cache_salt is not None:
        raise RequestError(
            "salt_unknown",
            "this caller's prompts have a cache salt of their own, which keys and hashes don't show",
            "send tokens or text",
            status=FORBIDDEN,
        )


def sees(tenant: str) -> bool:
    """Whether the caller's answers may show something of this tenant."""
    asking = _CALLER.get()
    return asking is None or asking.grant.tenant is None or asking.grant.tenant == tenant


def sees_all() -> bool:
    """Whether the caller is known, and its answers may show something of every tenant."""
    asking = _CALLER.get()
    return asking is None or (asking is not ANONYMOUS and asking.grant.tenant is None)
