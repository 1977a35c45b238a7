"""Which sources are followed, and why: named by the settings, over HTTP or at another replica, or found.

    settings, HTTP, store ── named ─┬───────────────► Registry ──► follow, hang_up (`LiveFleet`)
    finder ── found ────────────────┤                    ▲
                                    └► Listing ── listed ┘   an engine's HTTP address stands for what it lists

What somebody names wins over what was found.  Named twice, by the settings and by somebody, it stays until both are
done with it; what was found goes when it is lost, and nobody can unregister it.

Invariant: `follow` is told once of each source that enters the registry, and `hang_up` once when it leaves it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager

from kvindexer.errors import ConflictError, KvIndexerError
from kvindexer.events.keeping import Keeper
from kvindexer.events.listing import Listing, is_listing
from kvindexer.events.sources import Registry
from kvindexer.types import SourceSpec, SourceType

_log = logging.getLogger(__name__)

Told = Callable[[str, SourceSpec], None]
"""Told of a source, by its identity."""


class Membership:
    """The registered sources, and the engines that list theirs.

    `follow` is called for each source that comes and raises KvIndexerError if it can't be followed; `hang_up` is
    called for each that goes, and for one that can't be followed.  `keeper` is told what is registered over HTTP.
    """

    def __init__(self, registry: Registry, keeper: Keeper, *, follow: Told, hang_up: Told) -> None:
        self._registry = registry
        self._keeper = keeper
        self._follow = follow
        self._hang_up = hang_up
        self._running = False
        self._listings: dict[str, Listing] = {}
        self._listing_changes = 0
        self._configured: set[str] = set()
        """What is followed because the settings name it."""
        self._asked_for: set[str] = set()
        """What was registered over HTTP, here or at another replica."""
        self._found: dict[str, SourceSpec] = {}
        """What the finder has found, and nobody has named, by endpoint."""
        self._awaited: set[str] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Sources can come while it is entered; at the end no engine is asked any more for what it lists."""
        self._running = True
        try:
            yield
        finally:
            for listing in self._listings.values():
                await listing.close()
            self._running = False

    @property
    def generation(self) -> int:
        """Grows whenever `specs` changes."""
        return self._registry.generation + self._listing_changes

    def specs(self) -> list[SourceSpec]:
        """What is registered: sources, and engines that list theirs."""
        return [*(spec for _, spec in self._registry), *(listing.spec for listing in self._listings.values())]

    def sources(self) -> Mapping[str, SourceSpec]:
        """The publishers that are followed, by identity."""
        return dict(self._registry)

    def silent(self) -> list[Listing]:
        """The engines that have not listed anything yet."""
        return [listing for listing in self._listings.values() if not listing.sources]

    def _name(self, spec: SourceSpec) -> str:
        """What a source, or an engine that lists its own, is known by."""
        return spec.endpoint if is_listing(spec.endpoint) else self._registry.identity(spec)

    # Named

    def register(self, spec: SourceSpec) -> bool:
        """Follow what is asked for here, and tell the keeper; False if just this is registered already."""
        new = self._register(spec)
        self._asked_for.add(self._name(spec))
        if new:
            self._keeper.registered(self._registry.identity(spec), spec)
        return new

    def register_shared(self, spec: SourceSpec) -> None:
        """Follow what was asked for at another replica."""
        self._register(spec)
        self._asked_for.add(self._name(spec))

    def register_kept(self, spec: SourceSpec) -> None:
        """Follow what was registered before this process started; the settings of today win over it."""
        try:
            self.register_shared(spec)
        except KvIndexerError as error:
            _log.warning("source %s of the store is not followed: %s", spec.endpoint, error)

    def unregister_shared(self, name: str) -> None:
        """Forget what another replica has unregistered."""
        self._remove(name)

    def follow_configured(self, spec: SourceSpec) -> None:
        """Follow what the settings name now.  Raises KvIndexerError if it contradicts what others have registered."""
        self._register(spec)
        self._configured.add(self._name(spec))

    def forget_configured(self, spec: SourceSpec) -> None:
        """The settings don't name it any more; what somebody has registered as well stays."""
        name = self._name(spec)
        if name in self._configured:
            self._configured.discard(name)
            if name not in self._asked_for:
                self._remove(name)

    def _register(self, spec: SourceSpec) -> bool:
        """Follow what somebody has named, also if it was found before: it is followed as named then."""
        self._give_way(spec)
        return self._add(spec)

    def unregister(
        self,
        instance: str,
        *,
        model: str | None = None,
        tenant: str | None = None,
        rank: int | None = None,
        source_type: SourceType | None = None,
    ) -> list[SourceSpec]:
        """Forget an instance's sources, here and for all replicas; returns what was registered.

        What was found stays.  Raises ConflictError if it is all there is.
        """
        found = self._found_sources()
        listings = [
            listing
            for name, listing in self._listings.items()
            if name not in found
            and listing.spec.instance == instance
            and rank is None
            and model in (None, listing.spec.model)
            and tenant in (None, listing.spec.tenant)
            and source_type in (None, listing.spec.type)
        ]
        for listing in listings:
            listing.cancel()
            del self._listings[listing.spec.endpoint]
            self._disown(listing.spec.endpoint)
            self._listing_changes += 1
            self._keeper.unregistered(listing.spec.endpoint)
        removed = self._registry.unregister(
            instance, model=model, tenant=tenant, rank=rank, source_type=source_type, but=found
        )
        if not removed and not listings and any(spec.instance == instance for spec in found.values()):
            hint = "it goes with its pod, or with the annotation kvindexer.io/follow: 'false'"
            raise ConflictError(f"instance {instance!r} was found by discovery", hint)
        for source, _ in removed:
            self._keeper.unregistered(source)
        self._drop(removed)
        return [listing.spec for listing in listings] or [spec for _, spec in removed]

    # Found

    @property
    def found(self) -> Mapping[str, SourceSpec]:
        """What the finder has found, and nobody has named, by endpoint."""
        return self._found

    def find(self, spec: SourceSpec) -> None:
        """Follow what was found.  Raises ConflictError if somebody has named it."""
        name = self._name(spec)
        if name in self._registry or name in self._listings:
            raise ConflictError(f"{name} is registered already", "that registration is the one that counts")
        self._add(spec)
        self._found[spec.endpoint] = spec

    def lose(self, endpoint: str) -> None:
        """What was found there is gone for good."""
        spec = self._found.pop(endpoint, None)
        if spec is not None:
            self._remove(self._name(spec))

    def _found_sources(self) -> dict[str, SourceSpec]:
        """What was found, and what engines that were found list."""
        sources = dict(self._found)
        for endpoint in self._found:
            listing = self._listings.get(endpoint)
            sources |= {spec.endpoint: spec for spec in listing.sources} if listing is not None else {}
        return sources

    def _give_way(self, spec: SourceSpec) -> None:
        """Somebody names what we have found: it is theirs."""
        for endpoint in list(self._found):
            listing = self._listings.get(endpoint)
            listed = listing is not None and any(one.endpoint == spec.endpoint for one in listing.sources)
            if endpoint == spec.endpoint or listed:
                self.lose(endpoint)

    # Awaited

    def await_all(self) -> None:
        """What is registered by now, and nothing else, is waited for before the service is ready."""
        self._awaited = {*self.sources(), *self._listings}

    def await_also(self, spec: SourceSpec) -> None:
        """This one is waited for as well."""
        self._awaited.add(self._name(spec))

    def in_sync(self, synced: Callable[[str], bool]) -> bool:
        """Whether all that is waited for is past its first synchronisation, as `synced` says, or gone again."""
        return all(self._in_sync(name, synced) for name in self._awaited)

    def _in_sync(self, name: str, synced: Callable[[str], bool]) -> bool:
        listing = self._listings.get(name)
        if listing is not None:
            return bool(listing.sources) and all(self._in_sync(spec.endpoint, synced) for spec in listing.sources)
        return name not in self._registry or synced(name)

    # Whatever the reason

    def _add(self, spec: SourceSpec) -> bool:
        if is_listing(spec.endpoint):
            return self._list(spec)
        return self._add_source(spec)

    def _list(self, spec: SourceSpec) -> bool:
        known = self._listings.get(spec.endpoint)
        if known is not None:
            if known.spec == spec:
                return False
            raise ConflictError(f"{spec.endpoint} is registered with other values", "unregister it first")
        self._registry.check_endpoint(spec.endpoint)
        add = self._add_source if spec.life else self._add_listed
        self._listings[spec.endpoint] = Listing(spec, add, self._remove_source)
        self._listing_changes += 1
        return True

    def _add_listed(self, spec: SourceSpec) -> bool:
        """Follow what is listed by an engine that somebody has named."""
        self._give_way(spec)
        return self._add_source(spec)

    def _add_source(self, spec: SourceSpec) -> bool:
        if not self._running:
            raise RuntimeError("the service is not running")
        source = self._registry.register(spec)
        if source is None:
            return False
        try:
            self._follow(source, spec)
        except KvIndexerError:
            self._remove_source(spec)
            raise
        return True

    def _remove(self, name: str) -> None:
        """Forget a source, or an engine that lists its own and what it has listed."""
        listing = self._listings.pop(name, None)
        if listing is not None:
            self._disown(name)
            self._listing_changes += 1
            listing.cancel()
            for listed in listing.sources:
                self._remove_source(listed)
        spec = self._registry.remove(name)
        if spec is not None:
            self._drop([(name, spec)])

    def _remove_source(self, spec: SourceSpec) -> None:
        source = self._registry.identity(spec)
        if self._registry.remove(source) is not None:
            self._drop([(source, spec)])

    def _drop(self, removed: Iterable[tuple[str, SourceSpec]]) -> None:
        """Hang up on sources that are no longer registered."""
        for source, spec in removed:
            self._disown(source)
            self._hang_up(source, spec)

    def _disown(self, name: str) -> None:
        self._configured.discard(name)
        self._asked_for.discard(name)
        self._found.pop(name, None)
