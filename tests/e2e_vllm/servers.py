"""The two kinds of server: vLLM on a CPU with a model of random weights, and kvindexer."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from e2e_vllm.model import MAX_MODEL_LEN
from e2e_vllm.processes import Process, RunError
from e2e_vllm.prompts import BLOCK, Prompt
from kvindexer.commands.client import call
from kvindexer.commands.failure import CommandError

MODEL: Final = "tiny"
GPU_BLOCKS: Final = 64
START_WITHIN_S: Final = 240.0
REQUEST_TIMEOUT_S: Final = 60.0
ENVIRONMENT: Final = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # for /reset_prefix_cache
}


class Answer(NamedTuple):
    """What vLLM says of one request."""

    output: list[int]
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Variant:
    """In what one server differs from the other."""

    instance: str
    arguments: Sequence[str] = ()
    environment: tuple[tuple[str, str], ...] = ()
    note: str = ""


class Server:
    """A process that answers HTTP, life after life on the same ports."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        url: str,
        ready: str,
        log: Path,
        environment: Mapping[str, str],
    ) -> None:
        self.name = name
        self.url = url
        self._ready = ready
        self._command = command
        self._log = log
        self._environment = environment
        self._process: Process | None = None

    @property
    def process(self) -> Process:
        """The process of this life."""
        if self._process is None:
            raise RunError(f"{self.name} is not running")
        return self._process

    def start(self) -> None:
        """Begin a life."""
        self._process = Process(self.name, self._command, self._log, self._environment)

    def wait_ready(self) -> None:
        """Wait until it answers requests."""
        deadline = time.monotonic() + START_WITHIN_S
        while True:
            self.process.check()
            try:
                call(self.url, self._ready, timeout_s=5.0)
            except CommandError as error:
                if time.monotonic() > deadline:
                    raise RunError(f"{self.name} was not ready in {START_WITHIN_S:g} s: {error}") from None
            else:
                return
            time.sleep(0.2)

    def kill(self) -> None:
        """`kill -9` of all its processes."""
        self.process.kill()

    def stop(self) -> None:
        """End it if it runs."""
        if self._process is not None:
            self._process.stop()


class Vllm(Server):
    """One vLLM server."""

    def __init__(self, python: Path, model: Path, logs: Path, variant: Variant, ports: Sequence[int]) -> None:
        self.instance = variant.instance
        self.variant = variant
        http, self.events_port, replay = ports
        self.replay = f"tcp://127.0.0.1:{replay}"
        self.source = (
            f"instance={self.instance},model={MODEL},block_size={BLOCK},"
            f"endpoint=tcp://127.0.0.1:{self.events_port},replay={self.replay}"
        )
        events = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": f"tcp://[::ffff:127.0.0.1]:{self.events_port}",  # vLLM listens only if it sees * or ::
            "replay_endpoint": self.replay,
            "topic": f"kv@{self.instance}@{MODEL}",
        }
        options = {
            "--model": str(model),
            "--served-model-name": MODEL,
            "--load-format": "dummy",
            "--dtype": "float32",
            "--block-size": str(BLOCK),
            "--max-model-len": str(MAX_MODEL_LEN),
            "--num-gpu-blocks-override": str(GPU_BLOCKS),
            "--host": "127.0.0.1",
            "--port": str(http),
            "--kv-events-config": json.dumps(events),
        }
        command = [
            *(str(python), "-m", "vllm.entrypoints.openai.api_server"),
            *(word for option in options.items() for word in option),
            *("--enforce-eager", "--enable-prefix-caching", "--enable-prompt-tokens-details"),
            *variant.arguments,
        ]
        super().__init__(
            variant.instance,
            command,
            url=f"http://127.0.0.1:{http}",
            ready="/v1/models",
            log=logs / f"{variant.instance}.log",
            environment=ENVIRONMENT | dict(variant.environment),
        )

    def version(self) -> str:
        """Its own word."""
        return str(call(self.url, "/version")["version"])

    def complete(self, prompt: Prompt, **more: Any) -> Answer:
        """Send one request; raises CommandError if it fails."""
        body = {
            "model": MODEL,
            "prompt": prompt.tokens,
            "max_tokens": prompt.max_tokens,
            "ignore_eos": True,
            "return_token_ids": True,
            **({} if prompt.salt is None else {"cache_salt": prompt.salt}),
            **more,
        }
        answer = call(self.url, "/v1/completions", body, timeout_s=REQUEST_TIMEOUT_S)
        return Answer(answer["choices"][0]["token_ids"], answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    def reset(self) -> bool:
        """Ask it to empty its prefix cache; returns whether it did."""
        return bool(call(self.url, "/reset_prefix_cache", {})["success"])


class Indexer(Server):
    """The service under test."""

    def __init__(self, logs: Path, port: int, sources: Sequence[str]) -> None:
        command = [sys.executable, "-m", "kvindexer", "serve", "--port", str(port)]
        for source in sources:
            command += ["--source", source]
        url = f"http://127.0.0.1:{port}"
        super().__init__("kvindexer", command, url=url, ready="/ready", log=logs / "kvindexer.log", environment={})

    def source(self, instance: str) -> dict[str, Any]:
        """What /v1/sources says of an instance's one source."""
        [entry] = call(self.url, f"/v1/sources?instance={instance}")["sources"]
        return dict(entry)

    def match(self, prompt: Prompt, instance: str) -> dict[str, Any]:
        """The row of /v1/match for one instance."""
        salt = {} if prompt.salt is None else {"cache_salt": prompt.salt}
        body = {"model": MODEL, "tokens": prompt.tokens, "candidates": [instance], **salt}
        [row] = call(self.url, "/v1/match", body)["matches"]
        return dict(row)
