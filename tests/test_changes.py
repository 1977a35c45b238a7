"""What followers of changes are told: in the end exactly the content of the index, whatever happened in between."""

from __future__ import annotations

import zlib
from base64 import urlsafe_b64encode
from collections import deque
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from api_server import FakeLife
from kvindexer.index.engine import PyIndex
from kvindexer.index.records import read
from kvindexer.index.seam import IndexLimits
from kvindexer.tiering.changes import ChangeLog
from kvindexer.tiering.follower import PIECE, Follower
from kvindexer.tiering.position import MAX_TEXT, Mark, Position, read_position, written
from kvindexer.tiering.told import Blocks, Gone, Reset, TooSlowError
from kvindexer.types import SourceSpec
from oracle import Prompt, cleared, payload, placeholder, removed, stored

SIZE = 4
PROMPT = Prompt(tuple(range(100, 148)))
HASHES = tuple(range(2**63, 2**63 + 12))
POD = SourceSpec(instance="pod-a", model="m", block_size=SIZE, endpoint="tcp://pod-a:5557")
POD_B = replace(POD, instance="pod-b", endpoint="tcp://pod-b:5557")
STORE = replace(POD, instance="shared", type="store", endpoint="tcp://shared:1", tier="remote", readers=("pod-a",))
SPECS = {"a": POD, "b": POD_B, "shared": STORE}

Content = dict[str, dict[int, Any]]


class Service:
    """One replica: an index, and the log of its changes."""

    def __init__(self, name: str, max_bytes: int = 2**20, limits: IndexLimits | None = None) -> None:
        self.index = PyIndex(limits)
        self.log = ChangeLog(self.index, max_bytes, name)
        self.lives: dict[str, FakeLife] = {}
        self.waiting: dict[str, deque[bytes]] = {}

    def attach(self, source: str, spec: SourceSpec = POD) -> None:
        self.index.attach(source, spec)
        self.lives[source] = FakeLife()
        self.waiting[source] = deque()
        self.log.attached(source, spec, self.lives[source])

    def detach(self, source: str) -> None:
        self.log.forgotten(source)
        self.index.detach(source)
        del self.lives[source]

    def apply(self, source: str, *events: dict[str, Any], at: float = 1.0) -> None:
        self.take(source, payload(list(events), ts=at))

    def take(self, source: str, message: bytes) -> None:
        change = self.index.apply(source, message)
        self.log.applied(source, self.lives[source].take(message), change)

    def restart(self, source: str) -> None:
        """The engine is another one now."""
        life = self.lives[source]
        life.epoch, life.last_seq, life.sound, life.complete = life.epoch + 1, None, True, True
        life.digests.clear()
        self.index.withdraw(source)
        self.log.withdrawn(source)

    @property
    def content(self) -> Content:
        """What the index holds, source by source."""
        found: Content = {}
        for source in self.lives:
            hashes = self.index.hashes(source)
            blocks = {}
            for block_hash, packed in zip(hashes, self.index.records(source, hashes), strict=True):
                record = read(packed, SIZE)
                if record.spots:
                    blocks[block_hash] = (record.key, record.block_size, frozenset(name for name, _ in record.spots))
            found[source] = blocks
        return found


class View:
    """A client that does as it is told."""

    def __init__(self) -> None:
        self.blocks: Content = {}
        self.told: list[str] = []
        self.position: Position | None = None
        self.follower: Follower | None = None

    def connect(self, service: Service) -> None:
        """With the last position, which travels as text."""
        since = None if self.position is None else read_position(written(self.position))
        self.follower = service.log.follow(lambda spec: spec.model == "m", since, lambda: None)

    def hear(self) -> bool:
        """One piece; False: there was none."""
        assert self.follower is not None
        piece = self.follower.step()
        match piece:
            case None:
                return False
            case Gone(source):
                self.blocks.pop(source, None)
                self.told.append(f"gone {source}")
            case Reset(source):
                self.blocks[source] = {}
                self.told.append(f"reset {source}")
            case Blocks():
                assert len(piece.held) + len(piece.removed) <= 2 * PIECE
                mine = self.blocks[piece.source]
                for block in piece.held:
                    places = frozenset(name for name, _ in block.spots)
                    mine[block.hash] = (block.key, block.block_size, places)
                for block_hash in piece.removed:
                    mine.pop(block_hash, None)
                self.told.append(f"blocks {piece.source}")
        self.position = self.follower.position
        return True

    def hear_all(self) -> list[str]:
        self.told = []
        while self.hear():
            pass
        assert self.follower is not None
        self.position = self.follower.position
        return self.told

    def disconnect(self, service: Service) -> None:
        assert self.follower is not None
        service.log.unfollow(self.follower)
        self.follower = None


def whole(start: int = 0, end: int = 10, **more: Any) -> dict[str, Any]:
    return stored(
        PROMPT, HASHES[start:end], size=SIZE, start=start, parent=HASHES[start - 1] if start else None, **more
    )


def following(service: Service) -> View:
    view = View()
    view.connect(service)
    view.hear_all()
    assert view.blocks == service.content
    return view


@pytest.fixture
def service() -> Service:
    service = Service("one")
    service.attach("a")
    service.apply("a", whole())
    return service


def test_a_follower_begins_with_the_content_and_hears_what_changes(service: Service) -> None:
    view = following(service)
    assert view.told == ["reset a", "blocks a"]
    service.apply("a", removed(HASHES[5:]), placeholder(HASHES[:2]))
    assert view.hear_all() == ["blocks a"]
    assert view.blocks == service.content
    assert view.hear_all() == []


def test_several_batches_are_told_at_once_and_only_what_is_true_now(service: Service) -> None:
    view = following(service)
    for _ in range(5):
        service.apply("a", removed(HASHES[:1]))
        service.apply("a", whole(0, 1))
    assert view.hear_all() == ["blocks a"]


def test_sources_that_come_and_go_are_told(service: Service) -> None:
    view = following(service)
    service.attach("b", POD_B)
    service.apply("b", whole())
    assert view.hear_all()[0] == "reset b"
    service.detach("a")
    assert view.hear_all() == ["gone a"]
    service.attach("other", replace(POD, instance="x", endpoint="tcp://x:1", model="another"))
    assert view.hear_all() == []
    assert set(view.blocks) == {"b"}


def test_what_was_told_in_part_or_is_to_be_taken_back_is_not_forgotten_by_a_position(service: Service) -> None:
    """Found by the state machine: the client had something of the source, its position did not say so."""
    view = View()
    view.connect(service)
    view.hear()
    assert view.told == ["reset a"]
    view.disconnect(service)
    service.detach("a")
    view.connect(service)
    assert view.hear_all() == ["gone a"]
    service.attach("a")
    view.hear_all()
    service.detach("a")
    assert view.follower is not None
    view.position = view.follower.position
    view.disconnect(service)
    view.connect(service)
    assert view.hear_all() == ["gone a"]


def test_a_new_life_is_a_reset(service: Service) -> None:
    view = following(service)
    service.restart("a")
    service.apply("a", whole(0, 2))
    assert view.hear_all() == ["reset a", "blocks a"]
    assert view.blocks == service.content


def test_a_large_content_comes_in_pieces_that_keep_nobody_waiting(service: Service) -> None:
    service.attach("b", POD_B)
    service.apply("b", placeholder(range(1, 4 * PIECE + 1)))
    view = View()
    view.connect(service)
    while "reset b" not in view.told:
        view.hear()
    service.apply("a", removed(HASHES[:1]))
    view.told = []
    for _ in range(3):
        view.hear()
    assert "blocks a" in view.told
    view.hear_all()
    assert view.blocks == service.content


def test_a_position_is_taken_up_where_it_was_left(service: Service) -> None:
    view = following(service)
    view.disconnect(service)
    service.apply("a", removed(HASHES[5:]), at=2)
    view.connect(service)
    assert view.hear_all() == ["blocks a"]
    assert view.blocks == service.content
    view.disconnect(service)
    view.connect(service)
    assert view.hear_all() == []


def test_a_position_is_taken_up_by_another_replica() -> None:
    one, two = Service("one"), Service("two")
    for each in (one, two):
        each.attach("a")
        each.apply("a", whole(0, 3))
    two.lives["a"].epoch = 7  # replicas without a store count lives by themselves
    view = following(one)
    view.disconnect(one)
    two.apply("a", whole(3, 6), at=2)
    view.connect(two)
    assert view.hear_all() == ["blocks a"]
    assert view.blocks == two.content


@pytest.mark.parametrize("flag", ["sound", "complete"])
@pytest.mark.parametrize("where", ["before", "after"])
def test_a_position_of_what_is_not_certain_holds_for_its_own_replica_only(flag: str, where: str) -> None:
    one, two = Service("one"), Service("two")
    for each in (one, two):
        each.attach("a")
        each.apply("a", whole(0, 3))
    setattr((one if where == "before" else two).lives["a"], flag, False)
    view = following(one)
    view.disconnect(one)
    view.connect(one)
    assert view.hear_all() == []
    view.disconnect(one)
    view.connect(two)
    assert view.hear_all() == ["reset a", "blocks a"]


def test_a_position_of_another_life_begins_anew_though_all_numbers_are_the_same() -> None:
    """Replicas count lives by themselves, so another one's first life may be ours: messages tell them apart."""
    one, two = Service("one"), Service("two")
    for each in (one, two):
        each.attach("a")
    one.apply("a", whole(0, 3), at=1)
    two.apply("a", whole(0, 2), at=2)
    view = following(one)
    view.disconnect(one)
    view.connect(two)
    assert view.hear_all() == ["reset a", "blocks a"]
    assert view.blocks == two.content


def test_hashes_that_sources_share_hold_for_one_replica_only() -> None:
    one, two = Service("one"), Service("two")
    for each in (one, two):
        for source in ("a", "shared"):
            each.attach(source, SPECS[source])
            each.apply(source, whole(0, 2) if source == "a" else placeholder(HASHES[:1], medium=None))
    view = following(one)
    view.disconnect(one)
    view.connect(two)
    assert sorted(view.hear_all()) == ["blocks a", "blocks shared", "reset a", "reset shared"]
    assert view.blocks == two.content


def test_a_store_that_comes_later_changes_what_hashes_mean(service: Service) -> None:
    """Orphans of a store become blocks when a reader tells what they are."""
    service.attach("shared", STORE)
    service.apply("shared", placeholder(HASHES[:1], medium=None))
    view = following(service)
    assert view.blocks["shared"][HASHES[0]][0] == PROMPT.keys(SIZE)[0]


def test_what_is_not_kept_any_more_cuts_a_follower_off_and_a_position_begins_anew() -> None:
    service = Service("one", max_bytes=2000)
    service.attach("a")
    service.apply("a", whole())
    view = following(service)
    for n in range(20):
        service.apply("a", removed(HASHES[:1]) if n % 2 == 0 else whole(0, 1), at=n)
    with pytest.raises(TooSlowError):
        view.hear_all()
    view.disconnect(service)
    view.connect(service)
    assert view.hear_all() == ["reset a", "blocks a"]
    assert view.blocks == service.content


def test_what_is_kept_is_bounded_whatever_happens() -> None:
    service = Service("one", max_bytes=4000)
    for _ in range(50):
        service.attach("a")
        for n in range(50):
            service.apply("a", whole(), at=n)
        service.restart("a")
    log = service.log
    assert log._bytes == 0
    assert len(log._order) < 2000


def test_a_source_of_another_tenant_that_a_position_names_is_gone_for_it(service: Service) -> None:
    """A position is anybody's text: it opens nothing."""
    service.attach("red", replace(POD_B, tenant="red"))
    service.apply("red", whole())
    red = following_of(service, "red").position
    follower = service.log.follow(lambda spec: spec.tenant == "default", red, lambda: None)
    told = []
    while (piece := follower.step()) is not None:
        told.append(piece)
    assert [type(piece) for piece in told] == [Gone, Reset, Blocks]
    assert all(piece.source == "a" for piece in told[1:])


def following_of(service: Service, tenant: str) -> View:
    view = View()
    view.follower = service.log.follow(lambda spec: spec.tenant == tenant, None, lambda: None)
    view.hear_all()
    return view


# Positions as text


MARKS = st.builds(
    Mark,
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.binary(max_size=4),
    st.integers(0, 9),
    st.booleans(),
)


@given(st.builds(Position, st.text(max_size=8), st.dictionaries(st.text(max_size=20), MARKS, max_size=5)))
def test_a_position_survives_its_travel(position: Position) -> None:
    text = written(position)
    assert text.isascii()
    assert not set(text) - set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")
    assert read_position(text) == position


@given(
    st.text(max_size=100) | st.binary(max_size=100).map(lambda raw: urlsafe_b64encode(zlib.compress(raw)).decode())
)
def test_any_other_text_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_position(text)


def test_a_position_that_would_unfold_to_gigabytes_is_refused() -> None:
    bomb = urlsafe_b64encode(zlib.compress(b"\xc1" * 100_000_000, 9)).decode()
    for text in (bomb, "A" * (MAX_TEXT + 1)):
        with pytest.raises(ValueError, match="too long"):
            read_position(text)


# Whatever happens


class Event(NamedTuple):
    """What an engine may say."""

    kind: str
    start: int
    end: int

    @property
    def said(self) -> dict[str, Any]:
        hashes = HASHES[self.start : self.end]
        match self.kind:
            case "store":
                return whole(self.start, self.end)
            case "remove":
                return removed(hashes)
            case "offload":
                return placeholder(hashes)
            case "unload":
                return removed(hashes, medium="CPU")
            case _:
                return cleared()


EVENTS = st.builds(
    lambda kind, start, length: Event(kind, start, min(12, start + length)),
    st.sampled_from(["store", "store", "remove", "offload", "unload", "clear"]),
    st.integers(0, 11),
    st.integers(1, 6),
)
SOURCES = st.sampled_from(sorted(SPECS))


class Followed(RuleBasedStateMachine):
    """Two replicas that hear the same at different times, and a client that goes from one to the other."""

    def __init__(self) -> None:
        super().__init__()
        limits = IndexLimits(max_entries=40, max_entries_per_source=20, max_dead_bindings_per_source=3)
        self.services = [Service("one", 3000, limits), Service("two", 3000, limits)]
        self.attached: set[str] = set()
        self.view = View()
        self.at: Service | None = None
        self.clock = 0.0

    @rule(source=SOURCES)
    def come_or_go(self, source: str) -> None:
        for service in self.services:
            (service.detach if source in self.attached else lambda name: service.attach(name, SPECS[name]))(source)  # noqa: B023 - called at once
        self.attached ^= {source}

    @rule(source=SOURCES, events=st.lists(EVENTS, min_size=1, max_size=3))
    def say(self, source: str, events: list[Event]) -> None:
        self.clock += 1
        if source in self.attached:
            message = payload([event.said for event in events], ts=self.clock)
            for service in self.services:
                service.waiting[source].append(message)

    @rule(which=st.integers(0, 1), source=SOURCES, lost=st.sampled_from([False, False, False, True]))
    def listen(self, which: int, source: str, lost: bool) -> None:  # noqa: FBT001 - given by name
        service = self.services[which]
        if source in self.attached:
            waiting = service.waiting[source]
            if lost and waiting:
                life = service.lives[source]
                life.take(waiting.popleft())
                life.sound = life.complete = False
            while waiting:
                service.take(source, waiting.popleft())

    @rule(source=SOURCES)
    def restart(self, source: str) -> None:
        if source in self.attached:
            for service in self.services:
                service.waiting[source].clear()
                service.restart(source)

    @rule(which=st.integers(0, 1))
    def connect(self, which: int) -> None:
        if self.at is not None:
            self.view.disconnect(self.at)
        self.at = self.services[which]
        self.view.connect(self.at)

    @precondition(lambda self: self.at is not None)
    @rule(pieces=st.integers(1, 4))
    def hear(self, pieces: int) -> None:
        try:
            for _ in range(pieces):
                self.view.hear()
        except TooSlowError:
            assert self.at is not None
            self.view.disconnect(self.at)
            self.at = None

    @precondition(lambda self: self.at is not None)
    @rule()
    def hear_all(self) -> None:
        assert self.at is not None
        try:
            self.view.hear_all()
        except TooSlowError:
            self.view.disconnect(self.at)
            self.view.connect(self.at)
            self.view.hear_all()
        assert self.view.blocks == self.at.content

    @invariant()
    def bounded(self) -> None:
        for service in self.services:
            assert service.log._bytes <= 3000
            assert service.log._bytes == sum(
                200 + 8 * len(hashes) for ring in service.log._rings.values() for _, _, hashes in ring.entries
            )

    def teardown(self) -> None:
        for which in (0, 1):
            self.connect(which)
            self.hear_all()


TestFollowed = Followed.TestCase
TestFollowed.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
