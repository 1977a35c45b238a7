"""`python -m e2e_vllm`: see docs/e2e-vllm.md."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

from e2e_vllm import report
from e2e_vllm.processes import RunError, free_ports
from e2e_vllm.report import Versions
from e2e_vllm.scenario import Scenario
from e2e_vllm.servers import Indexer, Server, Variant, Vllm

if TYPE_CHECKING:
    from types import FrameType

LIMIT_S: Final = 1800
MODEL_WITHIN_S: Final = 120.0
VARIANTS: Final = (
    Variant("pod-a", note="prefill in one piece, sha256, hashes on the wire as integers"),
    Variant(
        "pod-b",
        ("--max-num-batched-tokens", "256", "--max-num-seqs", "8", "--prefix-caching-hash-algo", "sha256_cbor"),
        (("PYTHONHASHSEED", "7"), ("VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES", "0")),
        "chunked prefill of 256 tokens, sha256_cbor with a seed of its own, hashes on the wire as 32 bytes",
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything; 0 if all was as promised."""
    parser = argparse.ArgumentParser(prog="python -m e2e_vllm", description=__doc__)
    parser.add_argument("--vllm-python", type=Path, required=True, help="Python of the environment that has vLLM")
    parser.add_argument("--write", type=Path, metavar="FILE", help="rewrite the generated part of this document")
    parser.add_argument("--seed", type=int, default=20_001)
    parser.add_argument("--scale", type=float, default=1.0, help="times as many requests")
    parser.add_argument("--logs", type=Path, help="keep the servers' output here")
    options = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, _leave)
    signal.alarm(LIMIT_S)
    began = time.monotonic()
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvindexer-e2e-")))
        logs = options.logs or place
        logs.mkdir(parents=True, exist_ok=True)
        try:
            scenario = _scenario(options, place, logs, stack)
            scenario.run()
        except RunError as error:
            sys.stderr.write(f"e2e-vllm: {error}\n")
            return 2
        versions = _versions(options.vllm_python, scenario)
    result = report.text(scenario, versions, time.monotonic() - began)
    sys.stdout.write(result + "\n")
    if options.write:
        report.write(options.write, result)
    return 1 if report.failures(scenario) else 0


def _scenario(options: argparse.Namespace, place: Path, logs: Path, stack: ExitStack) -> Scenario:
    """Start all servers; the stack ends them."""
    python = options.vllm_python.absolute()
    model = place / "model"
    script = Path(__file__).with_name("model.py")
    subprocess.run([str(python), str(script), str(model)], check=True, timeout=MODEL_WITHIN_S)
    ports = free_ports(3 * len(VARIANTS) + 1)
    servers = [
        Vllm(python, model, logs, variant, ports[3 * number : 3 * number + 3])
        for number, variant in enumerate(VARIANTS)
    ]
    indexer = Indexer(logs, ports[-1], [server.source for server in servers])
    everybody: list[Server] = [*servers, indexer]
    for server in everybody:
        stack.callback(server.stop)
        server.start()
    for server in everybody:
        server.wait_ready()
    scenario = Scenario(indexer, servers, options.seed, options.scale)
    stack.callback(scenario.comparer.close)
    return scenario


def _versions(python: Path, scenario: Scenario) -> Versions:
    program = "import platform, torch; print(torch.__version__, platform.python_version())"
    command = [str(python), "-c", program]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60.0).stdout
    torch, version = said.split()
    return Versions(scenario.servers[0].version(), torch, version)


def _leave(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - what a handler is given
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
