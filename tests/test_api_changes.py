"""GET /v1/changes through a real server: events, positions, limits, clients that are slow or go."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest

from api_server import Api, batch, error, serving, until
from kvindexer.tokenization.blocks import pack_tokens, prompt_keys

PROMPT = list(range(100, 140))
KEYS = list(prompt_keys(pack_tokens(PROMPT), 4))
HASHES = [1000 + number for number in range(10)]


class Event(NamedTuple):
    """One server-sent event; comments have the name `:`."""

    name: str
    data: dict[str, Any]
    position: str | None


class Listener:
    """A client of the stream."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines

    def next(self, *, comments: bool = False) -> Event:
        """The next event."""
        fields: dict[str, str] = {}
        for line in self._lines:
            if line.startswith(":") and comments:
                return Event(":", {}, None)
            if not line and "event" in fields:
                return Event(fields["event"], json.loads(fields["data"]), fields.get("id"))
            name, _, value = line.partition(": ")
            fields[name] = value
        raise EOFError

    def until(self, name: str) -> list[Event]:
        """All events up to one of this name."""
        found = [self.next()]
        while found[-1].name != name:
            found.append(self.next())
        return found


@contextmanager
def listening(api: Api, *, headers: dict[str, str] | None = None, **parameters: Any) -> Iterator[Listener]:
    with api.client.stream(
        "GET", "/v1/changes", params={"model": "m", **parameters}, headers=headers or {}
    ) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        yield Listener(response.iter_lines())


@pytest.fixture
def api() -> Iterator[Api]:
    with serving() as running:
        yield running


def names(events: list[Event]) -> list[str]:
    return [event.name for event in events]


def test_content_first_then_what_changes(api: Api) -> None:
    source = api.add("pod-a")
    api.store(source, PROMPT[:8])
    with listening(api) as listener:
        reset, blocks, position = listener.until("position")
        assert reset.data == {
            "source": source,
            "instance": "pod-a",
            "epoch": 1,
            "seq": 0,
            "model": "m",
            "block_size": 4,
            "offload_blocks_per_chunk": 1,
        }
        assert blocks.data == {
            "source": source,
            "instance": "pod-a",
            "epoch": 1,
            "seq": 0,
            "stored": [
                {"hash": HASHES[0], "key": KEYS[0], "places": [{"tier": "gpu"}]},
                {"hash": HASHES[1], "key": KEYS[1], "places": [{"tier": "gpu"}]},
            ],
            "removed": [],
            "rest": 0,
        }
        assert position.data == {"sources": 1}
        assert position.position is not None
        removed = {"type": "BlockRemoved", "block_hashes": HASHES[:1], "medium": "GPU"}
        offloaded = {"type": "BlockStored", "block_hashes": HASHES[1:2], "token_ids": [], "block_size": 0}
        api.fleet.apply(source, batch(removed, {**offloaded, "medium": "CPU"}, rank=0))
        (told, *_) = listener.until("position")
        assert (told.name, told.data["seq"]) == ("blocks", 1)
        assert told.data["removed"] == HASHES[:1]
        assert told.data["stored"][0]["places"] == [{"tier": "gpu"}, {"tier": "cpu"}]
        assert "rest" not in told.data


@pytest.mark.parametrize("how", ["header", "parameter"])
def test_a_stream_goes_on_where_it_broke_off(api: Api, how: str) -> None:
    source = api.add("pod-a")
    api.store(source, PROMPT)
    with listening(api) as listener:
        position = listener.until("position")[-1].position
    assert position is not None
    api.fleet.apply(source, batch({"type": "BlockRemoved", "block_hashes": HASHES[5:], "medium": "GPU"}))
    options: dict[str, Any] = {"headers": {"last-event-id": position}} if how == "header" else {"since": position}
    with listening(api, **options) as listener:
        events = listener.until("position")
        assert names(events) == ["blocks", "position"]
        assert events[0].data["removed"] == HASHES[5:]


def test_another_replica_takes_the_position_up() -> None:
    """As a load balancer would have it: the same request, answered by somebody else."""
    with serving() as api:
        api.store(api.add("pod-a"), PROMPT)
        with listening(api) as listener:
            position = listener.until("position")[-1].position
    with serving() as api:
        api.fleet.changes.name = "another"
        source = api.add("pod-a")
        api.store(source, PROMPT)
        api.store(source, PROMPT[:4], first=3)
        with listening(api, since=position) as listener:
            assert names(listener.until("position")) == ["blocks", "position"]


def test_sources_that_go_and_come(api: Api) -> None:
    source = api.add("pod-a")
    api.store(source, PROMPT)
    with listening(api) as listener:
        listener.until("position")
        api.fleet.unregister("pod-a")
        assert listener.next() == Event("gone", {"source": source}, None)
        listener.until("position")
        api.store(api.add("shared", type="store", tier="remote", readers=("*",)), PROMPT)
        reset = listener.until("reset")[-1]
        assert (reset.data["store"], reset.data["readers"]) == ("shared", ["*"])
        assert "instance" not in reset.data


def test_tenants_models_and_salts_hear_their_own(api: Api) -> None:
    """Trap 27, for streams; no tokens, no salts."""
    pods: tuple[tuple[str, dict[str, Any]], ...] = (
        ("red", {"tenant": "red"}),
        ("other", {"model": "x"}),
        ("salty", {"additional_salt": "pepper"}),
        ("plain", {}),
    )
    for pod, fields in pods:
        api.store(api.add(pod, **fields), PROMPT)

    def heard(**parameters: Any) -> set[str]:
        with listening(api, **parameters) as listener:
            events = listener.until("position")
        assert "pepper" not in str(events)
        return {event.data["instance"] for event in events if event.name == "reset"}

    assert heard() == {"plain", "salty"}
    assert heard(tenant="red") == {"red"}
    assert heard(additional_salt="pepper") == {"salty"}
    assert heard(additional_salt="") == {"plain"}


def test_what_can_not_be_followed_is_refused(api: Api) -> None:
    api.add("pod-a")
    get = api.client.get
    assert error(get("/v1/changes"))[0] == 422
    assert error(get("/v1/changes", params={"model": "x"}))[:2] == (404, "unknown_model")
    assert error(get("/v1/changes", params={"model": "m", "tenant": "x"}))[0] == 404
    assert error(get("/v1/changes", params={"model": "m", "since": "x"}))[:2] == (422, "invalid_position")
    assert error(get("/v1/changes?model=m", headers=[(b"last-event-id", b"\xe9")]))[:2] == (422, "invalid_position")
    assert error(api.client.post("/v1/changes"))[0] == 405


def test_not_too_many_follow_at_once() -> None:
    with serving(max_change_streams=1) as api:
        api.add("pod-a")
        with listening(api) as listener:
            listener.until("position")
            response = api.client.get("/v1/changes", params={"model": "m"})
            assert error(response)[:2] == (503, "overloaded")
            assert response.headers["retry-after"] == "1"
        until(lambda: not api.fleet.changes._followers)
        with listening(api) as listener:
            listener.until("position")


def test_followers_leave_most_of_the_requests_to_others() -> None:
    with serving(max_concurrent_requests=2) as api:
        api.add("pod-a")
        with listening(api):
            assert error(api.client.get("/v1/changes", params={"model": "m"}))[0] == 503
            assert api.client.get("/v1/sources").status_code == 200


def test_silence_is_broken_by_signs_of_life() -> None:
    with serving(changes_heartbeat_s=0.05) as api:
        api.add("pod-a")
        with listening(api) as listener:
            listener.until("position")
            assert [listener.next(comments=True).name for _ in range(3)] == [":"] * 3


def test_a_client_that_goes_is_forgotten(api: Api) -> None:
    api.add("pod-a")
    with listening(api) as listener:
        listener.until("position")
        assert len(api.fleet.changes._followers) == 1
    until(lambda: not api.fleet.changes._followers)


def test_streams_end_when_the_service_is_about_to(api: Api) -> None:
    api.add("pod-a")
    with listening(api) as listener:
        listener.until("position")
        api.fleet.leaving = True
        assert listener.until("end")[-1].data == {"code": "leaving"}
        with pytest.raises(EOFError):
            listener.next()


def _unread(api: Api) -> socket.socket:
    """A client that asks and does not read."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(api.address)
    client.sendall(b"GET /v1/changes?model=m HTTP/1.1\r\nhost: x\r\n\r\n")
    return client


def test_a_client_that_falls_behind_is_told_so_and_cut_off(api: Api) -> None:
    source = api.add("pod-a")
    many = list(range(4 * 20_000))
    api.store(source, many)
    client = _unread(api)
    until(lambda: bool(api.fleet.changes._followers))
    for turn in range(40):
        api.store(source, many, first=turn + 2)
    client.settimeout(10)
    heard = b""
    while not heard.endswith(b"0\r\n\r\n"):
        heard = heard[-1000:] + client.recv(1 << 20)
    assert b'event: end\ndata: {"code":"too_slow"}' in heard
    client.close()


def test_a_client_that_takes_nothing_is_cut_off() -> None:
    with serving(changes_heartbeat_s=0.1) as api:
        api.store(api.add("pod-a"), list(range(4 * 100_000)))
        client = _unread(api)
        until(lambda: bool(api.fleet.changes._followers))
        until(lambda: not api.fleet.changes._followers)
        client.close()
