"""From a text over HTTP to blocks that an engine has announced over ZMQ: a whole service in a process of its own."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import httpx
import yaml

from api_server import NO_CERTIFICATES, until
from kvindexer.testing import FakeEngine, PoolShape
from served import Served
from tokenizing import fake_engine, ids, make_tokenizer, reply

SECRET = "Zanzibar"
WORDS = f"the quick brown fox jumps over the dog {SECRET} the dog jumps"
MESSAGES = [{"role": "system", "content": "the fox"}, {"role": "user", "content": WORDS}]
CHAT = f"<s> system the fox </s> user {WORDS} </s> assistant"
RENDER = "/v1/chat/completions/render"


def source(engine: FakeEngine, instance: str, model: str) -> dict[str, Any]:
    return {
        "instance": instance,
        "model": model,
        "block_size": 4,
        "endpoint": engine.endpoint,
        "replay": engine.replay_endpoint,
    }


def test_texts_match_what_engines_announce_and_nothing_of_them_is_told(tmp_path: Path) -> None:
    """P9 too: the text is in no log line of a service that says all it can."""
    shape = PoolShape(block_size=4)
    with FakeEngine(pool=shape) as ours, FakeEngine(pool=shape) as theirs, fake_engine() as server:
        server.says[RENDER] = lambda _: reply({"token_ids": ids(CHAT), "features": None})
        config = {
            "log_level": "debug",
            "drain_s": 0,
            "sources": [source(ours, "pod-a", "local"), source(theirs, "pod-b", "remote")],
            "tokenizers": {
                "local": {"path": str(make_tokenizer(tmp_path / "tokenizer"))},
                "remote": {"engines": [server.url]},
            },
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        served = Served(tmp_path, "one", "--config", str(tmp_path / "config.yaml"))
        served.start()
        try:
            for engine in (ours, theirs):
                engine.wait_for_subscribers()
                engine.run_request(ids(f"<s> {WORDS}"))
                engine.run_request(ids(CHAT))
            with httpx.Client(base_url=served.url, trust_env=False, verify=NO_CERTIFICATES) as client:

                def matched(model: str, **text: Any) -> dict[str, int]:
                    answer = client.post("/v1/match", json={"model": model, **text}).raise_for_status().json()
                    return {row["instance"]: row["matched_tokens"] for row in answer["matches"]}

                until(lambda: matched("local", messages=MESSAGES) == {"pod-a": len(ids(CHAT)) // 4 * 4})
                assert matched("local", prompt=WORDS) == {"pod-a": len(ids(WORDS)) // 4 * 4}
                assert matched("local", prompt="fox " + WORDS) == {}
                until(lambda: matched("remote", messages=MESSAGES) == {"pod-b": len(ids(CHAT)) // 4 * 4})
                scores = client.post("/score_completions", json={"model": "local", "prompt": WORDS}).json()
                assert scores == {"pod-a": float(len(ids(WORDS)) // 4)}
                refused = client.post("/v1/match", json={"model": "remote", "messages": [{"role": SECRET}, 7]})
                assert refused.status_code == 422
                assert SECRET not in refused.text
                outcomes = client.get("/metrics").text
            assert 'kvindexer_texts_total{outcome="tokenized"}' in outcomes
            assert 'kvindexer_texts_total{outcome="cached"}' in outcomes or server.paths() == [RENDER]
            assert served.end(signal.SIGTERM) == 0
        finally:
            served.close()
        assert SECRET not in served.log
        assert str(ids(CHAT)[:3])[1:-1] not in served.log
        assert "Traceback" not in served.log


def test_a_service_whose_tokenizer_is_missing_does_not_start(tmp_path: Path) -> None:
    """One line that names the setting, the value and what was expected."""
    served = Served(tmp_path, "one", "--set", f"tokenizers={{m: {{path: '{tmp_path / 'none'}'}}}}")
    try:
        served.start()
    except AssertionError:
        (line,) = [line for line in served.log.splitlines() if line.startswith("kvindexer: ")]
        assert line.startswith(f"kvindexer: setting tokenizers.m: {str(tmp_path / 'none')!r} is not usable")
        assert line.endswith("expected a directory with tokenizer.json")
        assert served.wait() == 2
    else:
        raise AssertionError("it started")
    finally:
        served.close()
