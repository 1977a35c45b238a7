"""The command line: what can be said.  What is then done lives in `commands/`, one module a command.

Exit codes: 0 all went well, 1 it could not be done, 2 it was asked for in a way that can't be used, 130 Ctrl-C.
A command's module is imported when the command is chosen, so that each pays for its own imports only.
"""

from __future__ import annotations

import os
import sys
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from kvindexer.errors import KvIndexerError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DEFAULT_URL: Final = "http://127.0.0.1:8090"
UNUSABLE: Final = 2
INTERRUPTED: Final = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; no error that was foreseen shows a traceback."""
    options = parser().parse_args(arguments)
    try:
        module = options.command.replace("-", "_")
        run = cast("Callable[[object], int]", import_module(f"kvindexer.commands.{module}").run)
        code = run(options)
        sys.stdout.flush()
    except SettingsError as error:
        print(f"kvindexer: {error}", file=sys.stderr)
        return UNUSABLE
    except KvIndexerError as error:
        print(f"kvindexer: {error}", file=sys.stderr)
        return int(getattr(error, "exit_code", 1))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # the reader of a pipe has gone; what is left in the buffer must not fail a second time at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def parser() -> ArgumentParser:
    """Build the command line."""
    made = ArgumentParser(
        prog="kvindexer", description="Which inference pod holds which prompt prefix, right now.", allow_abbrev=False
    )
    made.add_argument("--version", action="version", version=f"kvindexer {_version()}")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (summary, fill) in COMMANDS.items():
        fill(commands.add_parser(name, help=summary, description=summary, allow_abbrev=False))
    return made


def _serve(made: ArgumentParser) -> None:
    _settings(made)
    _exit_with_stdin(made)


def _settings(made: ArgumentParser) -> None:
    made.add_argument("--config", type=Path, metavar="FILE", help="YAML file of settings")
    made.add_argument("--host", help="address to listen on (else: setting host, 127.0.0.1)")
    made.add_argument("--port", help="TCP port; 0: any free one (else: setting port, 8090)")
    made.add_argument("--log-level", metavar="LEVEL", help="debug, info, warning, error or critical")
    made.add_argument(
        "--source",
        action="append",
        metavar="NAME=VALUE,...",
        help="a publisher, repeatable: instance=pod-a,model=m,block_size=16,endpoint=tcp://...,replay=tcp://...,rank=0",
    )
    made.add_argument(
        "--store", metavar="URL", help="of a Redis that holds a durable copy: redis://host:6379 (else: memory)"
    )
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any other setting, repeatable")


def _config(made: ArgumentParser) -> None:
    actions = made.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser("check", help=CONFIG_CHECK, description=CONFIG_CHECK, allow_abbrev=False)
    _settings(check)
    check.add_argument("--connect", action="store_true", help="ask the store, too")
    check.add_argument("--json", action="store_true", help="for programs")


def _simulate(made: ArgumentParser) -> None:
    _fleet(made)
    made.add_argument("--trace", type=Path, metavar="FILE", help="a Mooncake trace (JSONL) instead of made-up chats")
    made.add_argument(
        "--first-port", type=_whole, default=0, metavar="PORT", help="of engine 0 (else any free ports)"
    )
    made.add_argument("--seed", type=int, default=0, help="the same seed makes the same traffic (%(default)s)")
    made.add_argument("--register", metavar="URL", help="register each engine with the service there")
    made.add_argument("--route", metavar="URL", help="ask the service there which engine a request should go to")
    made.add_argument("--example", type=Path, metavar="FILE", help="write a query about a prompt that is held there")
    made.add_argument("--duration-s", type=_positive, metavar="SECONDS", help="end by itself")
    _way_in(made)
    _exit_with_stdin(made)


def _demo(made: ArgumentParser) -> None:
    _fleet(made)
    made.add_argument(
        "--replicas",
        type=_count,
        metavar="N",
        help="services that share a Redis, behind a load balancer (else one alone)",
    )
    made.add_argument(
        "--port", type=_whole, help="to send queries to (else 8090 if it is free, any free one otherwise)"
    )
    made.add_argument(
        "--interval-s", type=_positive, metavar="SECONDS", help="between updates (else 1, no terminal: 5)"
    )
    made.add_argument(
        "--duration-s", type=_positive, metavar="SECONDS", help="end by itself, that long after the table appeared"
    )
    _way_in(made)


def _query(made: ArgumentParser) -> None:
    made.add_argument(
        "file",
        nargs="?",
        default="-",
        metavar="FILE",
        help="token ids: a JSON list, or just numbers (else standard input)",
    )
    _service(made)
    made.add_argument("--model", required=True, help="as it was registered")
    made.add_argument("--block-size", type=_count, metavar="TOKENS", help="look at this block size only")
    made.add_argument("--tenant", metavar="NAME", help="whose blocks to look at (else: default)")
    made.add_argument("--lora", metavar="NAME", help="LoRA adapter of the request")
    made.add_argument("--cache-salt", metavar="SALT", help="cache salt of the request")
    made.add_argument("--candidate", action="append", metavar="INSTANCE", help="ask about these only, repeatable")
    made.add_argument("--json", action="store_true", help="print the answer as it came")


def _doctor(made: ArgumentParser) -> None:
    _service(made)
    made.add_argument("--json", action="store_true", help="for programs")


def _service(made: ArgumentParser) -> None:
    made.add_argument("--url", default=DEFAULT_URL, help="of the service (%(default)s)")
    _way_in(made)


def _way_in(made: ArgumentParser) -> None:
    """What `commands.client.way_in` reads."""
    made.add_argument(
        "--token-file", type=Path, metavar="FILE", help="file with a bearer token, if the service wants one"
    )
    made.add_argument(
        "--ca-file", type=Path, metavar="FILE", help="PEM file of authorities that the service is checked with"
    )
    made.add_argument("--cert-file", type=Path, metavar="FILE", help="PEM file of our own certificate")
    made.add_argument("--key-file", type=Path, metavar="FILE", help="PEM file of its key, if it is not in there too")


def _support_bundle(made: ArgumentParser) -> None:
    _service(made)
    made.add_argument(
        "--out", type=Path, default=Path("kvindexer-support.tar.gz"), metavar="FILE", help="to write (%(default)s)"
    )
    made.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file of settings, to be put in without secrets"
    )
    made.add_argument("--store", metavar="URL", help="of a Redis of which a summary is put in (else: of --config)")
    made.add_argument("--with-names", action="store_true", help="put in the names of tenants, too")


def _replay(made: ArgumentParser) -> None:
    made.add_argument("folder", type=Path, metavar="FOLDER", help="a recording, with a frames.jsonl")
    made.add_argument(
        "--endpoint", default="tcp://127.0.0.1:5557", help="to publish on (%(default)s); further sources: next ports"
    )
    made.add_argument("--replay-endpoint", metavar="ENDPOINT", help="to answer replay requests on")
    made.add_argument("--source", metavar="NAME", help="play this source of the recording only")
    made.add_argument(
        "--rate", type=_positive, metavar="PER_S", help="messages a second (else: as they were recorded)"
    )
    made.add_argument("--wait-s", type=_positive, metavar="SECONDS", help="wait that long for a subscriber first")
    made.add_argument("--loop", action="store_true", help="begin again at the end, each time as a new life")
    made.add_argument("--hold", action="store_true", help="stay at the end, for replay requests, until Ctrl-C")


def _inspect(made: ArgumentParser) -> None:
    _inspected(made)
    views = made.add_subparsers(dest="view", metavar="VIEW")
    for name, summary in VIEWS.items():
        view = views.add_parser(
            name, help=summary, description=summary, argument_default=SUPPRESS, allow_abbrev=False
        )
        if name in ("source", "entries"):
            view.add_argument("source", metavar="SOURCE", help="its name (its endpoint), or its instance's")
        if name == "entries":
            view.add_argument("--limit", type=_whole, default=50, metavar="N", help="at most; 0: all (%(default)s)")
        if name == "holders":
            view.add_argument("keys", nargs="+", type=_key, metavar="KEY", help="block keys, decimal or 0x...")
        _inspected(view)


def _inspected(made: ArgumentParser) -> None:
    def default(value: object) -> object:
        """A view must not take back what stood before it."""
        return SUPPRESS if made.argument_default == SUPPRESS else value

    made.add_argument("--store", default=default(None), metavar="URL", help="of the Redis (else: setting store)")
    made.add_argument(
        "--namespace", default=default(None), metavar="NAME", help="of the deployment (else: setting store_namespace)"
    )
    made.add_argument("--tenant", default=default(None), metavar="NAME", help="this tenant only (holders: default)")
    made.add_argument("--model", default=default(None), metavar="NAME", help="this model only")
    made.add_argument("--json", action="store_true", default=default(False), help="for programs")  # noqa: FBT003
    made.add_argument("--config", type=Path, default=default(None), metavar="FILE", help="YAML file of settings")
    made.add_argument(
        "--set", action="append", default=default([]), metavar="KEY=VALUE", help="any other setting, repeatable"
    )


VIEWS: Final = {
    "sources": "What is kept, a line a source (the default).",
    "source": "One source: checkpoint, facts, digest, memory.",
    "entries": "The records of a source.",
    "holders": "Who holds blocks, by their keys.",
}

CONFIG_CHECK: Final = "Would serve start with these settings?  Shows those that differ from their defaults."

COMMANDS: Final = {
    "serve": ("Run the service.", _serve),
    "demo": ("Run the service with a simulated fleet and show both at work.", _demo),
    "simulate": ("Run engines without a GPU that publish KV events as real ones do.", _simulate),
    "query": ("Ask who holds how much of a prompt.", _query),
    "config": ("Look at settings without serving.", _config),
    "doctor": ("Look for what is wrong with a running service.", _doctor),
    "support-bundle": ("Put together what others need to help, without secrets.", _support_bundle),
    "inspect": ("Read the index in Redis, without a running service.", _inspect),
    "replay": ("Publish a recording of a real engine.", _replay),
}


def _fleet(made: ArgumentParser) -> None:
    made.add_argument("--engines", type=_count, default=4, metavar="N", help="engines (%(default)s)")
    made.add_argument(
        "--rate", type=_positive, default=20.0, metavar="PER_S", help="requests a second, in all (%(default)s)"
    )
    made.add_argument("--blocks", type=_count, default=512, metavar="N", help="GPU blocks of an engine (%(default)s)")
    made.add_argument(
        "--cpu-blocks", type=_whole, default=1024, metavar="N", help="CPU blocks of an engine; 0: none (%(default)s)"
    )
    made.add_argument(
        "--block-size", type=_count, default=16, metavar="TOKENS", help="tokens of a block (%(default)s)"
    )
    made.add_argument("--model", default="simulated", help="name of the model (%(default)s)")


def _exit_with_stdin(made: ArgumentParser) -> None:
    made.add_argument(
        "--exit-with-stdin", action="store_true", help="end when standard input closes, as it does when a parent dies"
    )


def _count(text: str) -> int:
    if (number := int(text)) > 0:
        return number
    raise ArgumentTypeError(f"{text}: expected a number above 0")


def _whole(text: str) -> int:
    if (number := int(text)) >= 0:
        return number
    raise ArgumentTypeError(f"{text}: expected 0 or more")


def _key(text: str) -> int:
    try:
        number = int(text, 0)
    except ValueError:
        number = -1
    if 0 <= number < 2**64:
        return number
    raise ArgumentTypeError(f"{text}: expected a block key, as a decimal number or 0x...")


def _positive(text: str) -> float:
    if isfinite(number := float(text)) and number > 0:
        return number
    raise ArgumentTypeError(f"{text}: expected a finite number above 0")


def _version() -> str:
    try:
        return version("kvindexer")
    except PackageNotFoundError:  # run from a checkout that isn't installed
        return "unknown"
