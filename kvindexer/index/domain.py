"""A hash domain: what the engine hashes of its members mean.

    bindings   engine hash -> block key         learnt from stores that carry tokens; kept past the last copy
    waiting    parent hash -> {hash: local}     stores whose parent is not known yet: bound when it turns up
    waits_for  hash -> parent hash              the same links seen from the child
    unbound    held hashes without a key        orphans: counted as copies, in no answer until they are bound
    dead       bindings that nobody holds       least recently used first; the first to go at a bound

A source is a domain of its own; a store and the engines that read it share one, for they share hashes.

Invariants: once bound, a hash keeps its key; every held hash is either bound and shown or in `unbound`; a hash is
never in both; a binding that nobody holds is in `dead` (where some may be that are held again); a hash waits behind
one parent at most (the one named last), and only while it is not bound.

A domain has one *keeper*: the member whose records carry what is known of hashes that no member holds
(`index.records`).  It is the store with the smallest name, or without a store the member with the smallest name.

Queues are OrderedDicts: taking the first key out of a plain dict again and again walks over all that went before.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterable, Sequence
from itertools import filterfalse
from typing import TYPE_CHECKING

from kvindexer.index.topology import is_store
from kvindexer.tokenization.blocks import link

if TYPE_CHECKING:
    from kvindexer.index.share import Share
    from kvindexer.index.space import Space


def in_none(places: Iterable[Container[int]], hashes: Iterable[int]) -> Iterable[int]:
    """Those of these hashes that are in none of the places; for millions, so nothing here is done hash by hash."""
    for place in places:
        hashes = filterfalse(place.__contains__, hashes)
    return hashes


class Domain:
    """Bindings and orphans of the shares that have their hashes in common."""

    def __init__(self, space: Space) -> None:
        self.space = space
        """Where hashes are bound unless `elsewhere` says otherwise."""
        self.members: list[Share] = []
        self.keeper: Share | None = None
        """Whose records tell of hashes that nobody holds; None: no members."""
        self.bindings: dict[int, int] = {}
        self.elsewhere: dict[int, Space] = {}
        """Hashes whose blocks have another size than the registered one."""
        self.parents: dict[int, int] | None = None
        """Hash -> hash of the block before; kept only where offload chunks cover several blocks."""
        self.waiting: OrderedDict[int, dict[int, tuple[int, Space]]] = OrderedDict()
        self.waits_for: dict[int, int] = {}
        self.unbound: OrderedDict[int, None] = OrderedDict()
        self.dead: OrderedDict[int, None] = OrderedDict()
        self.learnt: list[int] = []
        """Hashes that may be held, of which the key, link or parent has changed since the engine looked last, beside
        those that an event has brought in."""
        self.unheld: list[int] = []
        """Hashes that nobody holds, of which the key or link has come or gone since the engine looked last."""
        self.conflicts = 0
        """Stores that named another block for a bound hash (and were overruled)."""

    def join(self, members: Iterable[Share]) -> None:
        """More shares have their hashes in common."""
        self.members += members
        self._choose_keeper()

    def leave(self, member: Share) -> None:
        """One share less."""
        self.members.remove(member)
        self._choose_keeper()

    def _choose_keeper(self) -> None:
        self.keeper = min(self.members, key=lambda member: (not is_store(member.spec), member.source), default=None)

    def space_of(self, block_hash: int) -> Space:
        """The keyspace that a bound hash's key belongs to."""
        return self.elsewhere.get(block_hash, self.space)

    def bind(self, block_hash: int, key: int, space: Space) -> None:
        """Learn what a hash means, and what its waiting descendants mean; all places that hold them show them."""
        open_ends = [(block_hash, key, space)]
        while open_ends:
            found, its_key, its_space = open_ends.pop()
            known = self.bindings.setdefault(found, its_key)
            if known != its_key:
                self.conflicts += 1
                continue
            if its_space is not self.space:
                self.elsewhere[found] = its_space
            self._unlink(found)
            if found in self.unbound:
                del self.unbound[found]
                self.learnt.append(found)
                for member in self.members:
                    member.bound(found, its_key, its_space)
            elif found != block_hash:  # its last copy went while it waited for its parent
                self.bury(found)
                self.unheld.append(found)
            children = self.waiting.pop(found, None)
            if children:
                for child, (local, where) in children.items():
                    del self.waits_for[child]
                    open_ends.append((child, link(its_key, local), where))

    def bind_behind(self, parent: int, block_hash: int, local: int, space: Space) -> None:
        """Bind a hash that is not bound yet by its parent's key, now or once the parent is bound."""
        key = self.bindings.get(parent)
        if key is not None:
            self.bind(block_hash, link(key, local), space)
            self.bury(block_hash)
            return
        self._unlink(block_hash)
        self.waiting.setdefault(parent, {})[block_hash] = (local, space)
        self.waits_for[block_hash] = parent
        if block_hash in self.unbound:
            self.learnt.append(block_hash)

    def _unlink(self, block_hash: int) -> None:
        """This hash waits for no parent any more."""
        parent = self.waits_for.pop(block_hash, None)
        if parent is not None:
            children = self.waiting[parent]
            del children[block_hash]
            if not children:
                del self.waiting[parent]

    def follow(self, hashes: Sequence[int], parent: int | None) -> None:
        """Note which block is before which, where offload chunks make that matter; `parent` is before the first."""
        parents = self.parents
        if parents is None:
            return
        for block_hash in hashes:
            if parent is not None and parents.get(block_hash) != parent:
                parents[block_hash] = parent
                if block_hash in self.bindings or block_hash in self.unbound:
                    self.learnt.append(block_hash)
            parent = block_hash

    def bury(self, block_hash: int) -> None:
        """Nobody may hold this bound hash any more: it is forgotten when as many others have come behind it."""
        self.dead[block_hash] = None
        self.dead.move_to_end(block_hash)

    def bury_all(self, block_hashes: Iterable[int]) -> None:
        """`bury` for many."""
        dead = self.dead
        for block_hash in block_hashes:
            if block_hash in dead:
                dead.move_to_end(block_hash)
            else:
                dead[block_hash] = None

    def forget_dead(self, bindings_limit: int, links_limit: int) -> tuple[int, int]:
        """Bound the bindings that no member holds, and the links that wait for a parent; returns how many went."""
        links = 0
        oldest = [self.dead.popitem(last=False)[0] for _ in range(len(self.dead) - bindings_limit)]
        gone = self._unheld(oldest) if oldest else []
        for block_hash in gone:
            self.bindings.pop(block_hash, None)
            self.elsewhere.pop(block_hash, None)
            if self.parents is not None:
                self.parents.pop(block_hash, None)
        self.unheld += gone
        while len(self.waits_for) > links_limit:
            _, children = self.waiting.popitem(last=False)
            links += len(children)
            for child in children:
                del self.waits_for[child]
                if self.parents is not None:
                    self.parents.pop(child, None)
                (self.learnt if child in self.unbound else self.unheld).append(child)
        return len(gone), links

    def _unheld(self, block_hashes: Sequence[int]) -> Sequence[int]:
        """Those bound hashes of which no member has a copy; mostly nobody has the block, which is seen at once."""
        keys = [self.bindings.get(block_hash, -1) for block_hash in block_hashes]
        spaces = {self.space, *filter(None, map(self.elsewhere.get, block_hashes))}
        shown: set[int] = set()
        for space in spaces:
            for blocks in space.tiers:
                shown.update(filter(blocks.__contains__, keys))
        pairs = zip(block_hashes, keys, strict=True)
        return [block_hash for block_hash, key in pairs if key not in shown or not self.holds(block_hash)]

    def holds(self, block_hash: int) -> bool:
        """Whether any member has a copy."""
        return any(member.holds(block_hash) for member in self.members)

    def holds_none(self, hashes: Iterable[int]) -> Iterable[int]:
        """Those of these hashes that no member has a copy of."""
        places = [place.copies for member in self.members for place in member.places.values() if place.copies]
        return in_none(places, hashes)

    def absorb(self, other: Domain) -> None:
        """Take over another domain's members and knowledge; for a hash known to both, ours stays."""
        if other is self:
            return
        held = {block_hash for member in other.members for block_hash in member.hide_all()}
        if self.parents is not None or other.parents is not None:
            self.parents = {**(other.parents or {}), **(self.parents or {})}
        self._learn_from(other)
        for member in other.members:
            member.domain = self
        for block_hash in held:
            known = self.bindings.get(block_hash)
            if known is None:
                self.unbound[block_hash] = None
                continue
            for member in other.members:
                member.bound(block_hash, known, self.space_of(block_hash))
        self.join(other.members)
        self.learnt += other.learnt
        self.unheld += other.unheld

    def _learn_from(self, other: Domain) -> None:
        for block_hash, key in other.bindings.items():
            self.bind(block_hash, key, other.space_of(block_hash))
        for parent, children in other.waiting.items():
            for child, (local, space) in children.items():
                if child not in self.bindings:
                    self.bind_behind(parent, child, local, space)
        self.dead |= other.dead
