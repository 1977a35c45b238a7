"""`kvindexer query`: ask who holds how much of a prompt."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvindexer.commands.client import call, way_in
from kvindexer.commands.failure import CommandError
from kvindexer.commands.tables import STATE_COLUMNS, TIER_COLUMNS, cell, console, state_cells, table, tier_cells

if TYPE_CHECKING:
    from argparse import Namespace

    from rich.table import Table

REASONS: Final = {
    "shorter_than_a_block": "Nothing matched: the prompt is shorter than one block.",
    "no_instance": "Nothing matched: no instance of this model is registered.",
    "no_known_candidate": "Nothing matched: none of the candidates is an instance of this model.",
    "nothing_held": "Nothing matched: no instance holds the first block of this prompt.",
    "filtered_by_require": "Nothing matched: those who hold a part of the prompt don't meet what is required.",
}
MAX_TOKEN: Final = 2**32 - 1
_SEPARATORS = re.compile(r"[\s,]+")


def run(options: Namespace) -> int:
    """Ask and print."""
    body: dict[str, Any] = {"model": options.model, "tokens": read_tokens(options.file)}
    choices = {
        "tenant": options.tenant,
        "block_size": options.block_size,
        "lora": options.lora,
        "cache_salt": options.cache_salt,
        "candidates": options.candidate,
    }
    body |= {name: value for name, value in choices.items() if value is not None}
    answer = call(options.url, "/v1/match", body, way=way_in(options))
    if options.json:
        print(json.dumps(answer, indent=2))
        return 0
    out = console()
    try:
        matches = answer["matches"]
        out.print(cell(f"{answer['tokens']} tokens, {answer['blocks']} full blocks, model {answer['model']}"))
        if matches:
            out.print(matches_table(matches))
        if reason := answer.get("reason"):
            out.print(cell(REASONS.get(reason, f"Nothing matched: {reason}.")))
        if unknown := answer.get("unknown_candidates"):
            out.print(cell(f"Unknown candidates: {', '.join(map(str, unknown))}"))
    except (LookupError, TypeError, AttributeError):
        raise CommandError("the answer has an unknown form", f"is {options.url} another version?") from None
    return 0


def matches_table(matches: list[dict[str, Any]]) -> Table:
    """Make a row of each match, in the order of the answer: best first.

    Lengths are in tokens, those of a tier together with the nearer ones.
    """
    nearest, *further = TIER_COLUMNS
    made = table(
        ("instance", "matched", "cached", nearest, *(f"+{tier}" for tier in further), *STATE_COLUMNS, "lag ms"),
        words=("instance", *STATE_COLUMNS),
    )
    for match in matches:
        made.add_row(
            cell(match["instance"]),
            cell(match["matched_tokens"]),
            cell(match["cached_tokens"]),
            *tier_cells({tier: held["cumulative_tokens"] for tier, held in match["tiers"].items()}),
            *state_cells(match),
            cell(match.get("lag_ms")),
        )
    return made


def read_tokens(file: str) -> list[int]:
    """Read token ids from a file, or from standard input for `-`: a JSON list, or numbers between spaces."""
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CommandError(f"{file} can't be read: {error}", exit_code=2) from None
    try:
        values = json.loads(text) if text.lstrip().startswith(("[", "{")) else _SEPARATORS.split(text.strip())
        if isinstance(values, dict):
            values = values["tokens"]
        tokens = [int(value) for value in values if value != ""]
    except (ValueError, TypeError, LookupError, RecursionError):
        raise CommandError(f"{file}: expected token ids, as a JSON list or as numbers", exit_code=2) from None
    for place, token in enumerate(tokens):
        if not 0 <= token <= MAX_TOKEN:
            raise CommandError(f"{file}: number {place + 1} is no token id, expected 0 to {MAX_TOKEN}", exit_code=2)
    return tokens
