"""What `kvindexer inspect` prints: tables for eyes, JSON for programs.

Hashes and keys are hexadecimal texts in both: 64 bits do not survive every JSON reader as numbers.  A source's salt
and the local hashes of blocks that wait are not shown.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from kvindexer.commands.tables import cell, console, fitting_table, table
from kvindexer.hiding import HIDDEN
from kvindexer.index import facts
from kvindexer.store.directory import Kind
from kvindexer.store.layout import pack_spec

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.table import Table

    from kvindexer.index.records import Record
    from kvindexer.store.layout import Meta
    from kvindexer.store.reader import Entry, Held, Listed, Reader, Whole
    from kvindexer.types import SourceSpec

LEVELS: Final = ("lossy", "late", "complete")
"""Words for the levels of coverage."""
_NAMES: Final = ("source", "instance", "model", "tenant", "kind", "writer", "generation", "coverage")


class Report(NamedTuple):
    """How to print, and what was looked at."""

    namespace: str
    as_json: bool

    def json(self, value: object) -> None:
        """Print a whole document."""
        print(json.dumps(value, indent=2))


# Sources


def show_sources(report: Report, listed: Sequence[Listed]) -> None:
    """A line a source; what was unregistered and is gone is only counted."""
    shown = [one for one in listed if one.kind is not Kind.REMOVED or one.meta is not None]
    gone = len(listed) - len(shown)
    if report.as_json:
        report.json({"namespace": report.namespace, "sources": [summary(one) for one in shown], "unregistered": gone})
        return
    out = console()
    if shown:
        out.print(_sources_table(shown, out.width))
    entries = sum(one.meta.entries for one in shown if one.meta is not None)
    ended = f", {gone} unregistered" if gone else ""
    out.print(cell(f"{len(shown)} sources with {entries} entries in namespace {report.namespace}{ended}"))
    if not listed:
        out.print(cell("Is store_namespace right (--namespace), and has a replica run with this store?"))
    for one in shown:
        if one.problem:
            out.print(cell(f"{one.source}: {one.problem}"))


def _sources_table(listed: Sequence[Listed], width: int) -> Table:
    tenants = len({one.spec.tenant for one in listed if one.spec is not None} | {"default"}) > 1
    names = ["source", "instance", "model", *(["tenant"] if tenants else []), "kind", "epoch", "seq", "coverage"]
    names += ["entries", "buckets", "generation", "writer"]
    rows = []
    for one in listed:
        values = summary(one)
        rows.append({**values, "coverage": values["coverage"] and values["coverage"]["word"]})
    return fitting_table(names, rows, width, words=_NAMES, dispensable=("writer", "generation", "buckets", "kind"))


def summary(one: Listed) -> dict[str, Any]:
    """What is kept of a source, in a line."""
    values: dict[str, Any] = {
        "source": one.source,
        "instance": None if one.spec is None else one.spec.instance,
        "model": None if one.spec is None else one.spec.model,
        "tenant": None if one.spec is None else one.spec.tenant,
        "kind": None if one.kind is None else one.kind.value,
        "registration": one.registration,
        "shard": one.tag or None,
        **_checkpoint(one.meta),
    }
    return {**values, "problem": one.problem} if one.problem else values


def _checkpoint(meta: Meta | None) -> dict[str, Any]:
    if meta is None:
        return dict.fromkeys(("epoch", "seq", "coverage", "entries", "buckets", "generation", "writer"))
    epoch, upto, _, _, (level, first) = meta.checkpoint
    return {
        "epoch": epoch,
        "seq": upto - 1 if upto else None,
        "coverage": {"level": level, "word": LEVELS[level] if level < len(LEVELS) else str(level), "first": first},
        "entries": meta.entries,
        "buckets": meta.buckets,
        "generation": meta.generation,
        "writer": meta.writer,
    }


# One source


def show_source(report: Report, one: Listed, whole: Whole, memory: int | None) -> None:
    """Everything that Redis knows of one source beside its entries."""
    meta, digest = whole.meta, whole.digest
    values: dict[str, Any] = summary(one._replace(meta=meta)) | {
        "digest": {"entries": digest.entries, "xor": f"{digest.xor:016x}", "of_one_moment": not whole.moving},
        "last_message": meta.checkpoint.digest.hex() or None,
        "first_message": meta.checkpoint.birth.hex() or None,
        "memory_bytes": memory,
        "facts": _facts(meta.facts),
        "spec": {} if one.spec is None else _shown_spec(one.spec),
    }
    if report.as_json:
        report.json(values)
        return
    out = console()
    made = table(("", " "), words=("", " "))
    made.show_header = False
    for name, value in _lines(values, whole):
        made.add_row(cell(name), cell(value))
    out.print(made)
    if whole.moving:
        out.print(cell("The shard is being written; the digest is of no single moment."))


def _lines(values: dict[str, Any], whole: Whole) -> Iterator[tuple[str, object]]:
    coverage, digest, known, memory = (values[name] for name in ("coverage", "digest", "facts", "memory_bytes"))
    for name in ("source", "instance", "model", "tenant", "kind", "registration", "shard", "epoch", "seq"):
        yield name, values[name]
    yield "coverage", f"{coverage['word']}, from seq {coverage['first']}"
    yield "last message", values["last_message"]
    yield "first message", values["first_message"]
    yield "entries", values["entries"]
    yield "digest", f"{digest['entries']} entries, xor {digest['xor']}"
    per = f", {memory / whole.digest.entries:.1f} an entry" if memory and whole.digest.entries else ""
    yield "memory", None if memory is None else f"{memory} bytes{per}"
    yield "buckets", values["buckets"]
    yield "generation", values["generation"]
    yield "writer", values["writer"]
    yield "truncated", "yes: entries were dropped at a bound" if known["truncated"] else "no"
    for group in known["groups"]:
        lower = ", also below the GPU" if group["seen_lower"] else ""
        tail = group["tail_blocks"]
        rule = "" if tail is None else ", every block counts" if tail == 0 else f", the last {tail} blocks count"
        yield f"rank {group['rank']} group {group['group']}", f"{group['block_size']} tokens a block{lower}{rule}"
    for name, value in values["spec"].items():
        if name not in values:
            yield name.replace("_", " "), value


def _facts(packed: bytes) -> dict[str, Any]:
    try:
        known = facts.read(packed)
    except ValueError as error:
        return {"truncated": None, "groups": [], "problem": str(error)}
    return {
        "truncated": known.truncated,
        "groups": [
            {
                "rank": group.rank,
                "group": group.group,
                "block_size": group.block_size,
                "seen_lower": group.seen_lower,
                "tail_blocks": None if group.rule is None else group.rule[0],
                "kind_known": None if group.rule is None else group.rule[1],
            }
            for group in known.groups
        ],
    }


def _shown_spec(spec: SourceSpec) -> dict[str, Any]:
    """A registration without what is as it is by default, and without its salt."""
    values = json.loads(pack_spec(spec))
    return {name: HIDDEN if name == "additional_salt" else value for name, value in values.items()}


# Entries


async def show_entries(report: Report, reader: Reader, one: Listed, meta: Meta, limit: int) -> None:
    """Records of a source as they come, at most `limit`; 0: all."""
    left = limit or sys.maxsize
    printed = 0
    if report.as_json:
        head = json.dumps(summary(one), indent=2)
        print(head.removesuffix("\n}") + ',\n  "records": [', end="")
    async for page in reader.entries(one, meta):
        page = page[:left]  # noqa: PLW2901 - the rest of it is nobody's
        if report.as_json:
            print("".join(_separated(page, first=not printed)), end="")
        elif page:
            console().print(_entries_table(page))
        printed += len(page)
        left -= len(page)
        if not left:
            break
    changed = await reader.changed(one, meta)
    if report.as_json:
        print(f'\n  ],\n  "of_one_generation": {json.dumps(not changed)}\n}}')
        return
    console().print(cell(f"{printed} of {meta.entries} records of {one.source}"))
    if changed:
        console().print(cell("The shard was written anew meanwhile, so some may be missing: ask again."))


def _separated(page: Sequence[Entry], *, first: bool) -> Iterator[str]:
    for place, entry in enumerate(page):
        yield ("" if first and not place else ",") + "\n    " + json.dumps(_entry(entry))


def _entry(entry: Entry) -> dict[str, Any]:
    record = entry.record
    return {
        "hash": _hex(entry.block_hash),
        "key": None if record.key is None else _hex(record.key),
        "block_size": record.block_size,
        "parent": None if record.parent is None else _hex(record.parent),
        "waits_for": None if record.link is None else _hex(record.link.parent),
        "places": _places(record),
    }


def _places(record: Record) -> list[dict[str, Any]]:
    return [
        {
            "rank": name.rank,
            "group": name.group,
            "tier": name.tier.label,
            "ownership": name.ownership,
            "block_size": name.block_size,
            "copies": copies,
        }
        for name, copies in record.spots
    ]


def _entries_table(page: Sequence[Entry]) -> Table:
    names = ("engine hash", "block key", "rank", "group", "tier", "owner", "copies", "note")
    made = table(names, words=("engine hash", "block key", "tier", "owner", "note"))
    for entry in page:
        values = _entry(entry)
        places = values["places"] or [dict.fromkeys(("rank", "group", "tier", "ownership", "copies"))]
        for number, place in enumerate(places):
            shown = (values["hash"], values["key"]) if not number else ("", "")
            columns = [place[name] for name in ("rank", "group", "tier", "ownership", "copies")]
            made.add_row(*map(cell, (*shown, *columns, "" if number else _note(values))))
    return made


def _note(entry: dict[str, Any]) -> str:
    """What is unusual about a record."""
    notes = []
    if entry["waits_for"]:
        notes.append(f"orphan, waits for {entry['waits_for']}")
    elif entry["key"] is None:
        notes.append("orphan")
    if not entry["places"]:
        notes.append("held by nobody, remembered")
    if entry["parent"]:
        notes.append(f"behind {entry['parent']}")
    return "; ".join(notes)


# Holders


def show_holders(report: Report, keys: Sequence[int], found: Sequence[Held], sources: int, tenant: str) -> None:
    """Who holds each of the keys, in the order in which they were asked for."""
    rows: dict[int, list[dict[str, Any]]] = {key: [] for key in keys}
    for held in found:
        rows[held.key] += _holder(held)
    if report.as_json:
        asked = [{"key": _hex(key), "holders": holders} for key, holders in rows.items()]
        report.json({"namespace": report.namespace, "tenant": tenant, "sources": sources, "keys": asked})
        return
    out = console()
    names = ("block key", "instance", "model", "rank", "group", "tier", "copies", "owner", "source")
    lines: list[dict[str, Any]] = []
    for key, holders in rows.items():
        for number, row in enumerate(holders or [dict.fromkeys(names, "") | {"instance": "nobody"}]):
            lines.append({**row, "owner": row.get("ownership", ""), "block key": "" if number else _hex(key)})
    words = ("block key", "instance", "model", "tier", "owner", "source")
    out.print(fitting_table(names, lines, out.width, words=words, dispensable=("source", "owner", "group")))
    out.print(cell(f"{sources} sources of tenant {tenant} in namespace {report.namespace}"))


def _holder(held: Held) -> list[dict[str, Any]]:
    one, spec = held.listed, held.listed.spec
    head = {"source": one.source} if spec is None else {"instance": spec.instance, "model": spec.model}
    return [{**head, "source": one.source, "hash": _hex(held.block_hash), **place} for place in _places(held.record)]


def _hex(number: int) -> str:
    return f"{number:#018x}"
