"""Every route against its own OpenAPI document: no fault of ours, and no answer that the document does not describe.

Schemathesis makes the requests: at the edges of every schema, one step beyond them, and random ones of both kinds.
Twice: with the document as it is, and with one in which the names are those of sources that are there, since a random
model is a 404.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import cycle
from typing import Any, Final, NamedTuple

import msgspec
import pytest
import schemathesis
from schemathesis.engine import events, from_schema

from api_server import Api, serving
from kvindexer.tokenization.blocks import pack_tokens, prompt_keys
from tokenizing import make_tokenizer

PROMPT: Final = list(range(40))
PODS: Final = [f"pod-{number}" for number in range(12)]
"""So many that a follower of changes has heard `MOST_EVENTS` at once, and nobody waits for more."""
MOST_EVENTS: Final = 20
CHECKS: Final = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "use_after_free",
)
JSON: Final = "application/json"
MSGPACK: Final = "application/msgpack"
TEXT_FIELDS: Final = (
    *("tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message", "add_special_tokens"),
)
_POD: Final = {"enum": PODS[:2]}
THERE: Final[dict[str, Any]] = {
    "model": {"const": "m"},
    "model_name": {"const": "m"},
    "instance": _POD,
    "near": _POD,
    "block_size": {"const": 4},
    "candidates": {"type": "array", "items": {"enum": [*PODS[:3], "pod-x"]}},
    "instance_id": {"enum": ["new"]},
    "endpoint": {"const": "tcp://127.0.0.1:1"},
    "type": {"enum": ["vllm"]},
    "require": {"type": "array", "items": {"enum": ["live", "sound", "complete"]}},
    "top": {"type": "integer", "minimum": 1, "maximum": 100},
    "since": {"const": ""},
}
"""Fields and parameters with the values that mean something here."""
ABSENT: Final = {
    *("tenant", "tenant_id", "routing_group", "additional_salt", "additionalsalt", "modelname", "rank", "dp_rank"),
    *("source", "lora_name", "lora_id", "block_hash", "block_hashes"),
}
"""Those that would ask for something that is not here, or say the same in other words."""
MEANT: Final = {"model", "seq_hashes"}
"""Those without which a body that the document allows is refused."""


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    path = make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    with serving(tokenizers={"m": {"path": str(path)}}) as running:
        for pod in PODS:
            running.store(running.add(pod), PROMPT)
        running.add("shared", type="store", tier="remote", readers=("*",))
        for _ in range(3):
            running.post("/v1/match", {"model": "m", "tokens": PROMPT})  # some heat
        yield running


@schemathesis.serializer(MSGPACK)
def packed(_: schemathesis.SerializationContext, value: Any) -> bytes:
    """What is base64 in JSON is binary here."""
    if isinstance(value, dict):
        value = {name: _binary(name, inner) for name, inner in value.items()}
    try:
        return msgspec.msgpack.encode(value)
    except (OverflowError, UnicodeEncodeError):  # what msgpack can't say
        return b"\xc1"


def _binary(name: str, value: Any) -> Any:
    if name.endswith("_b64") and isinstance(value, str):
        try:
            return base64.b64decode(value, validate=True)
        except (ValueError, binascii.Error):
            pass
    return value


@schemathesis.deserializer(MSGPACK)
def unpacked(_: schemathesis.DeserializationContext, response: schemathesis.Response) -> Any:
    return json.loads(msgspec.json.encode(msgspec.msgpack.decode(response.content)))


ACCEPTED: Final = cycle((JSON, MSGPACK))


@schemathesis.hook
def before_call(_: schemathesis.HookContext, case: schemathesis.Case[Any], __: dict[str, Any]) -> None:
    """Every second request asks for msgpack, also where there is none to be had."""
    case.headers["accept"] = next(ACCEPTED)


def document_of(api: Api) -> dict[str, Any]:
    document: dict[str, Any] = api.client.get("/openapi.json").json()
    return document


class Answered(NamedTuple):
    """Requests of one kind to one operation, and how they were answered."""

    operation: str
    sent: str
    status: int
    answer: str


def run(api: Api, document: Mapping[str, Any], *, edges: bool = False, examples: int = 0) -> Counter[Answered]:
    """What the routes answered."""
    config = schemathesis.Config.from_dict(
        {
            "seed": 1,
            "max-stream-events": MOST_EVENTS,
            "generation": {"deterministic": True, "mode": "all", "max-examples": max(1, examples)},
            "phases": {
                "coverage": {"enabled": edges},
                "fuzzing": {"enabled": examples > 0},
                "stateful": {"enabled": False},
            },
            "checks": {"enabled": False, **{name: {"enabled": True} for name in CHECKS}},
        }
    )
    schema = schemathesis.openapi.from_dict(dict(document), config=config)
    schema.config.update(base_url=str(api.client.base_url))
    answered: Counter[Answered] = Counter()
    wrong = []
    for event in from_schema(schema).execute():
        if isinstance(event, events.ScenarioFinished):
            for case_id, interaction in event.recorder.interactions.items():
                response = interaction.response
                assert response is not None, f"{event.label}: no answer"
                sent = (interaction.request.headers.get("Content-Type") or [""])[0]
                kind = (response.headers.get("content-type") or [""])[0]
                answered[Answered(event.label or "", sent, response.status_code, kind)] += 1
                wrong += [
                    f"{event.label}: {check.failure_info.failure.title}: {check.failure_info.failure.message}"
                    for check in event.recorder.checks.get(case_id, [])
                    if check.failure_info is not None
                ]
        elif isinstance(event, events.NonFatalError | events.FatalError):
            wrong.append(repr(event))
    assert not wrong, "\n".join(dict.fromkeys(wrong))
    return answered


FORMS: Final[dict[str, dict[str, Any]]] = {
    "tokens": {"tokens": {"enum": [PROMPT, PROMPT[:9], []]}},
    "tokens_b64": {"tokens_b64": {"enum": ["", base64.b64encode(pack_tokens(PROMPT)).decode()]}},
    "keys": {"keys": {"enum": [[], list(prompt_keys(pack_tokens(PROMPT), 4))]}},
    "prompt": {"prompt": {"enum": ["", "the quick brown fox"]}},
    "messages": {"messages": {"enum": [[{"role": "user", "content": "the fox"}]]}},
    "hashes": {"hashes": {"type": "array", "items": {"enum": [1000, 1001, 7]}}, "instance": _POD},
}
"""Ways to say what a request is about, of which it must have one."""
ALONE: Final = {"instance", "keys_b64", "prompt_tokens", "multimodal", "lora", "cache_salt", *TEXT_FIELDS}
"""Fields that not every form of a prompt may have beside it, or that no token was stored with."""


def at_home(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document, as one would write it for these sources only: names are theirs, a prompt is given once."""
    home: dict[str, Any] = json.loads(json.dumps(document))
    schemas = home["components"]["schemas"]
    for name in {*_requests(home), "BatchPrompt"}:
        schemas[name] = _at_home(schemas[name])
    for operations in home["paths"].values():
        for operation in operations.values():
            operation["parameters"] = [
                {**parameter, "schema": THERE[parameter["name"]]}
                for parameter in operation.get("parameters", ())
                if parameter["name"] in THERE
            ]
    return home


def _requests(document: Mapping[str, Any]) -> set[str]:
    found = re.findall(r'"requestBody": .*?"#/components/schemas/(\w+)"', json.dumps(document))
    return set(found)


def _at_home(schema: dict[str, Any]) -> dict[str, Any]:
    """One schema for each form that there is."""
    needed = {*MEANT.intersection(schema["properties"]), *schema.get("required", ())}
    known = {name: THERE.get(name, kind) for name, kind in schema["properties"].items() if name not in ABSENT}
    forms = [form for name, form in FORMS.items() if name in known] or [{}]
    rest = {name: kind for name, kind in known.items() if name not in FORMS and (name in needed or name not in ALONE)}
    return {
        "anyOf": [{**schema, "properties": rest | form, "required": sorted(needed.union(form))} for form in forms]
    }


def operations(document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{method.upper()} {path}": operation
        for path, by_method in document["paths"].items()
        for method, operation in by_method.items()
    }


def check_at_home(api: Api, examples: int) -> None:
    document = document_of(api)
    answered = run(api, at_home(document), examples=examples)
    for name, operation in operations(document).items():
        good = {answer for answer in answered if answer.operation == name and answer.status < 300}
        assert good, f"{name}: no request was good enough, so nothing was proven"
        if MSGPACK in json.dumps(operation):
            assert {answer.sent for answer in good} >= {JSON, MSGPACK}, name
            assert {answer.answer for answer in good} == {JSON, MSGPACK}, name


def check_anywhere(api: Api, examples: int) -> None:
    document = document_of(api)
    if not examples:  # the same structs a second time: left to the slower test
        del document["paths"]["/v1/explain"]
        for operation in operations(document).values():
            operation.get("requestBody", {}).get("content", {}).pop(MSGPACK, None)
    answered = run(api, document, edges=True, examples=examples)
    assert {answer.operation for answer in answered} == set(operations(document))
    assert all(answer.status < 500 for answer in answered)


def test_routes_answer_about_what_is_there_as_their_document_says(api: Api) -> None:
    check_at_home(api, 10)


def test_routes_answer_to_anything_as_their_document_says(api: Api) -> None:
    check_anywhere(api, 0)


@pytest.mark.proof
def test_the_same_with_many_requests(api: Api) -> None:
    check_at_home(api, 100)
    check_anywhere(api, 100)
