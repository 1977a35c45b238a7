"""From the names in a query to keyspaces, and from a prompt to matches in each of them.

Keyspaces that don't exist are an error that says what does, since silence looks like a cold cache.  It never says
more than the caller's own tenant may know, and never a salt.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from time import monotonic
from typing import Final, NamedTuple

from kvindexer.access.identity import tenant_of
from kvindexer.api.fleet import Fleet
from kvindexer.api.prompt import Prompt
from kvindexer.errors import RequestError, UnknownModelError
from kvindexer.index.seam import HolderMatch, Index
from kvindexer.types import Keyspace

DEFAULT_TENANT: Final = "default"
KNOWN_FOR_S: Final = 1.0


def tenant_named(given: str | None) -> str:
    """The tenant that a request is about, given what it names.  Raises RequestError if its caller may not."""
    return tenant_of(given) or DEFAULT_TENANT


class KnownModels:
    """Models by tenant, for hints.

    A wrong name may come with every request of a scheduler, and asking the fleet costs time for each source: once a
    second is enough.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._looked_at = -KNOWN_FOR_S
        self._models: dict[str, set[str]] = {}

    def of(self, tenant: str) -> tuple[str, ...]:
        """Models that the tenant may know of, in order."""
        now = monotonic()
        if now - self._looked_at >= KNOWN_FOR_S:
            self._looked_at = now
            self._models = {}
            for report in self._fleet.reports():
                self._models.setdefault(report.spec.tenant, set()).add(report.spec.model)
        return tuple(sorted(self._models.get(tenant, ())))


class Found(NamedTuple):
    """The matches in one keyspace."""

    keyspace: Keyspace
    matches: list[HolderMatch]


def keyspaces(
    index: Index, known: KnownModels, tenant: str, model: str, *, additional_salt: str | None, block_size: int | None
) -> list[Keyspace]:
    """All keyspaces that a query is about, at least one.  Raises UnknownModelError, RequestError."""
    spaces = index.keyspaces(tenant, model, additional_salt)
    if not spaces:
        if additional_salt is not None and index.keyspaces(tenant, model):
            raise RequestError(
                "unknown_salt",
                f"no source of model {model!r} is registered with this additional salt",
                "leave it away to look at all deployments of the model",
                status=404,
            )
        raise UnknownModelError(model, known.of(tenant))
    if block_size is None:
        return spaces
    chosen = [space for space in spaces if space.block_size == block_size]
    if not chosen:
        raise RequestError(
            "unknown_block_size",
            f"no source of model {model!r} has blocks of {block_size} tokens",
            f"known block sizes: {_sizes(spaces)}",
            status=404,
        )
    return chosen


def one_size(spaces: list[Keyspace], what: str) -> int:
    """The block size that keys were made for.  Raises RequestError if it is not clear."""
    size = spaces[0].block_size
    if any(space.block_size != size for space in spaces):
        raise RequestError(
            "block_size_needed",
            f"the model has blocks of several sizes, and {what} belong to one",
            f"give block_size, one of: {_sizes(spaces)}",
        )
    return size


def find(index: Index, spaces: list[Keyspace], prompt: Prompt, candidates: Collection[str] | None) -> list[Found]:
    """Match a prompt in each of the keyspaces."""
    if len(spaces) == 1:
        space = spaces[0]
        size = space.block_size
        return [Found(space, index.match(space, prompt.keys(size), prompt.whole(size), candidates))]
    keys = {size: prompt.keys(size) for size in {space.block_size for space in spaces}}
    return [
        Found(
            space,
            index.match(space, keys[space.block_size], prompt.whole(space.block_size), candidates),
        )
        for space in spaces
    ]


def _sizes(spaces: Iterable[Keyspace]) -> str:
    return ", ".join(map(str, sorted({space.block_size for space in spaces})))
