"""Where the store is and what can go wrong with it: read strictly, shown without passwords, said in our words."""

from __future__ import annotations

import asyncio
import inspect
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio.sentinel
import redis.exceptions
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from kvindexer.cli import main
from kvindexer.errors import SettingsError, StoreError
from kvindexer.settings import Settings, load_settings
from kvindexer.store.address import StoreAddress, Tls, read_address
from kvindexer.store.connect import open_client
from kvindexer.store.failures import CODES, FAILURES, HINTS, REASONS, asking, store_error
from kvindexer.store.replica import replica_name

SECRET = "s3cret"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("memory", StoreAddress()),
        (" Memory ", StoreAddress()),
        ("redis://h", StoreAddress("single", (("h", 6379),))),
        ("redis://h:1/2", StoreAddress("single", (("h", 1),), db=2)),
        ("REDISS://[::1]:7", StoreAddress("single", (("::1", 7),), tls=Tls())),
        ("redis://u@h/", StoreAddress("single", (("h", 6379),), username="u")),
        ("redis+sentinel://a,b:1/main", StoreAddress("sentinel", (("a", 26379), ("b", 1)), service="main")),
        ("redis+sentinel://a/main/3", StoreAddress("sentinel", (("a", 26379),), service="main", db=3)),
        (
            "rediss+sentinel://a/main?sentinel_auth=same",
            StoreAddress("sentinel", (("a", 26379),), service="main", sentinel_auth=True, tls=Tls()),
        ),
        ("redis+cluster://a,b:1", StoreAddress("cluster", (("a", 6379), ("b", 1)))),
        ("rediss+cluster://a/0?ssl_cert_reqs=none", StoreAddress("cluster", (("a", 6379),), tls=Tls(verify=False))),
        (
            "rediss://a?ssl_check_hostname=false",
            StoreAddress("single", (("a", 6379),), tls=Tls(check_hostname=False)),
        ),
    ],
)
def test_every_form_of_a_store_is_read(text: str, expected: StoreAddress) -> None:
    assert read_address(text) == expected


def test_user_and_password_are_percent_decoded() -> None:
    read = read_address("redis://us%40er:p%2Fw%23@h")
    assert read.username == "us@er"
    assert read.password is not None
    assert read.password.get_secret_value() == "p/w#"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "memory, redis://"),
        ("redis", "memory, redis://"),
        ("http://h", "memory, redis://"),
        ("redis+ring://h", "memory, redis://"),
        ("redis://", "host"),
        ("redis://:6379", "host"),
        ("redis://h:0", "port"),
        ("redis://h:65536", "port"),
        ("redis://[::1", "memory, redis://"),
        ("redis://a,b", "redis+cluster"),
        ("redis://h/x", "database"),
        ("redis://h/1/2", "database"),
        ("redis://h/99999999999", "database"),
        ("redis://h#x", "%23"),
        ("redis://h?db=1", "rediss"),
        ("redis+sentinel://a", "service"),
        ("redis+sentinel://a/?x=1", "service"),
        ("redis+cluster://a/1", "database 0"),
        ("rediss://h?verify=none", "ca_certs"),
        ("rediss://h?ca_certs=/no/such/file", "ca_certs"),
        ("rediss://h?ssl_cert_reqs=maybe", "required or none"),
        ("rediss://h?ssl_cert_reqs=none&ssl_cert_reqs=none", "once"),
        (f"rediss://h?keyfile={__file__}", "certfile"),
        (f"redis://:{SECRET}/@h", "%2F"),
        (f"redis://:{SECRET}?x=@h", "%3F"),
        (f"redis://:{SECRET}#@h", "%23"),
        (f"redis://user:{SECRET}", "host"),
        (f"http://user:{SECRET}@h", "memory, redis://"),
        (f"user:{SECRET}@h", "memory, redis://"),
        (f"redis://a:{SECRET}@h:99999", "port"),
        ("redis://a:@h", "password"),
    ],
)
def test_what_is_no_store_is_named_without_its_password(text: str, expected: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(None, {"store": text}, {})
    assert caught.value.key == "store"
    assert expected in caught.value.expected
    assert SECRET not in str(caught.value)


@given(st.text(max_size=40) | st.from_regex(r"rediss?(\+\w+)?://[a-z:@,/?=#%0-9\[\]]{0,30}"))
def test_whatever_the_text_of_a_store_only_a_settings_error_escapes(text: str) -> None:
    try:
        read = read_address(text)
    except SettingsError as error:
        assert "\n" not in str(error)  # noqa: PT017 - the property is about the errors that do escape
    else:
        assert read.kind == "memory" or read.hosts


@given(st.text(alphabet="abc@:/?#%,[]", min_size=1, max_size=12))
def test_no_error_shows_a_password(mess: str) -> None:
    """However the rest of the URL is broken, with an @ behind it or without."""
    for text in (f"redis://user:{SECRET}{mess}@h:x", f"redis://user:{SECRET}{mess}"):
        try:
            read = read_address(text)
        except SettingsError as error:
            shown = str(error)
        else:
            shown = repr(read) + str(read)
        assert SECRET not in shown


def test_a_wrong_store_ends_the_command_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--store", f"redis://:{SECRET}@h:x"]) == 2
    said = capsys.readouterr().err
    assert "store" in said
    assert SECRET not in said


@pytest.mark.parametrize("store", ["redis://", "rediss://", "redis+sentinel://", "redis+cluster://"])
def test_no_repr_shows_a_password(store: str) -> None:
    """Neither the settings nor anything of the client, whose errors repeat its repr."""
    settings = Settings(store=read_address(f"{store}kv:{SECRET}@h/{'main?sentinel_auth=same' * ('sen' in store)}"))

    async def shown() -> str:
        client = open_client(settings)
        inside = [client, *vars(client).values()] if isinstance(client, Redis) else [client, client.nodes_manager]
        text = " ".join(map(repr, inside)) + repr(getattr(client, "connection_kwargs", ""))
        if isinstance(client, Redis):
            text += repr(client.connection_pool.connection_kwargs) + repr(vars(client.connection_pool))
        await client.aclose()
        return text

    text = asyncio.run(shown())
    assert "Credentials" in text
    assert SECRET not in text + repr(settings) + str(settings)
    assert SECRET not in repr(Settings(store_password=SecretStr(SECRET)))


def test_memory_has_no_client() -> None:
    with pytest.raises(SettingsError):
        open_client(Settings())


def test_a_password_is_given_in_one_place(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text(SECRET + "\n")
    url, inside = "redis://h", f"redis://:{SECRET}@h"
    for values in (
        {"store": inside, "store_password": SECRET},
        {"store": inside, "store_password_file": str(file)},
        {"store": url, "store_password": SECRET, "store_password_file": str(file)},
    ):
        with pytest.raises(SettingsError, match="one password") as caught:
            load_settings(None, values, {})
        assert SECRET not in str(caught.value)
    assert load_settings(None, {"store": url, "store_password_file": str(file)}, {}).store.kind == "single"


@pytest.mark.parametrize("content", [None, b"", b"\n", b"\xff\xfe", b"x" * 5000])
def test_a_file_without_a_password_is_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "password"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        load_settings(None, {"store_password_file": str(file)}, {})
    assert caught.value.key == "store_password_file"


@pytest.mark.parametrize(
    ("key", "value"),
    [("store_namespace", ""), ("store_namespace", "a{b"), ("store_namespace", "a:b"), ("replica", "a b")],
)
def test_names_are_such_as_can_be_parts_of_a_key(key: str, value: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(None, {key: value}, {})
    assert caught.value.key == key


def test_a_replica_has_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "pod 7!")
    assert replica_name(Settings(replica="a")) == "a"
    first, second = replica_name(Settings()), replica_name(Settings())
    assert first != second
    assert first.startswith("pod-7-")


def exceptions_of_redis() -> list[type[BaseException]]:
    found = [*vars(redis.exceptions).values(), *vars(redis.asyncio.sentinel).values()]
    kinds = {kind for kind in found if inspect.isclass(kind) and issubclass(kind, BaseException)}
    return sorted(kinds, key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", exceptions_of_redis(), ids=lambda kind: kind.__name__)
def test_every_error_of_redis_py_has_a_reason(kind: type[BaseException]) -> None:
    """Those that a newer redis-py brings have to be decided about here."""
    assert kind.__name__ in REASONS
    raised = kind("1 h:1")
    assert isinstance(raised, FAILURES)
    error = store_error(raised)
    assert error.hint == HINTS[error.reason]


def test_every_reason_has_its_hint() -> None:
    assert {*REASONS.values(), *CODES.values(), "not_a_cluster"} == set(HINTS)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionRefusedError("no"), "unreachable"),
        (ConnectionResetError("no"), "unreachable"),
        (asyncio.IncompleteReadError(b"", 1), "unreachable"),
        (TimeoutError(), "timeout"),
        (socket.gaierror(-2, "no name"), "unknown_host"),
        (ssl.SSLCertVerificationError("no"), "tls"),
        (ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value"), "wrong_type"),
        (ResponseError("NOREPLICAS Not enough good replicas to write."), "too_few_replicas"),
        (ResponseError("MISCONF Redis is configured to save RDB snapshots"), "cannot_save"),
        (ResponseError("BUSY Redis is busy running a script."), "busy"),
        (
            ResponseError("Error running script (call to f_1): @user_script:1: -OOM command not allowed"),
            "out_of_memory",
        ),
        (ResponseError("user_script:1: READONLY You can't write against a read only replica."), "read_only"),
        (ResponseError("unknown command 'EVALSHA'"), "refused"),
        (ValueError("a bug"), "unexpected"),
    ],
)
def test_what_happened_is_said_in_our_words(error: BaseException, reason: str) -> None:
    assert store_error(error).reason == reason
    assert store_error(store_error(error)).reason == reason


def test_a_servers_answer_is_cut_and_on_one_line() -> None:
    error = store_error(ResponseError("x\r\n" * 10_000))
    assert "\n" not in str(error)
    assert len(str(error)) < 400


def test_asking_ends_in_time_and_lets_bugs_through() -> None:
    async def ask(failing: BaseException | None) -> None:
        async with asking(0.01):
            if failing is not None:
                raise failing
            await asyncio.sleep(10)

    def outcome(failing: BaseException | None) -> Any:
        with pytest.raises(Exception) as caught:  # noqa: PT011 - which one is looked at by those who call
            asyncio.run(ask(failing))
        return caught.value

    assert outcome(None).reason == "timeout"
    assert outcome(ResponseError("OOM x")).reason == "out_of_memory"
    assert isinstance(outcome(StoreError("busy", "x")), StoreError)
    assert isinstance(outcome(KeyError("a bug")), KeyError)
