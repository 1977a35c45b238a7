"""What is wrong with a running service, by what it says of itself: answers of its routes to findings, without I/O.

    /health, /v1/sources, version ─► one finding a check ─► ok, warn or fail, what was seen, what to do

`fail`: answers are wrong or missing because of it.  `warn`: answers may be, or something can't be repaired.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

Level = Literal["ok", "warn", "fail"]
Source = Mapping[str, Any]

MOST_NAMED: Final = 5
"""Sources that one finding names."""

ORPHANS: Final = 0.1
"""Share of a source's blocks without a place from which on it is worth a word."""

POISON: Final = 0.1
"""Share of a source's batches that could not be read from which on its answers are wrong."""

LATE_MS: Final = 1000.0


class Finding(NamedTuple):
    """The result of one check."""

    level: Level
    check: str
    what: str
    advice: str = ""
    sources: tuple[str, ...] = ()
    """Those that it is about."""


class Seen(NamedTuple):
    """What is not as it should be with one source."""

    level: Level
    what: str


class SourceCheck(NamedTuple):
    """Looks at each source by itself."""

    check: str
    look: Callable[[Source], Seen | None]
    good: str
    advice: str


def _listing(source: Source) -> bool:
    """Whether this is an engine that was to list its publishers, and has not yet."""
    return str(source["endpoint"]).startswith(("http://", "https://"))


def _lists(source: Source) -> Seen | None:
    return Seen("fail", source["why"]) if _listing(source) else None


def _live(source: Source) -> Seen | None:
    state, why = source["state"], source["why"]
    if state == "live" or _listing(source):
        return None
    return Seen("warn" if state == "syncing" else "fail", f"{state}, {why}" if why else state)


def _events(source: Source) -> Seen | None:
    if _listing(source) or source["batches"] or _blocks(source):
        return None
    return Seen("warn", "no event has ever come")


def _block_size(source: Source) -> Seen | None:
    registered = source["block_size"]
    others = [size for size in source.get("block_sizes", ()) if size != registered]
    if not others:
        return None
    return Seen("fail", f"registered with {registered}, events say {', '.join(map(str, others))}")


def _sound(source: Source) -> Seen | None:
    return None if source["sound"] else Seen("warn", source["why"] or "not sound")


def _complete(source: Source) -> Seen | None:
    if source["complete"] or _listing(source):
        return None
    return Seen("warn", source["why"] or "not complete")


def _poison(source: Source) -> Seen | None:
    bad, batches = source["poison"], source["batches"]
    if not bad:
        return None
    return Seen("fail" if bad >= POISON * batches else "warn", f"{bad} unreadable, of {batches} batches")


def _gaps(source: Source) -> Seen | None:
    if not source["gaps"] or (source["replay"] and source["sound"] and source["complete"]):
        return None
    return Seen("warn", f"{source['gaps']} gaps, {source['replays']} replays")


def _orphans(source: Source) -> Seen | None:
    orphans, blocks = source["orphans"], _blocks(source)
    if not orphans or orphans < ORPHANS * blocks:
        return None
    return Seen("warn", f"{orphans} of {blocks} blocks")


def _replay(source: Source) -> Seen | None:
    return None if source["replay"] or _listing(source) else Seen("warn", "no replay endpoint")


def _lag(source: Source) -> Seen | None:
    return None if source["lag_ms"] < LATE_MS else Seen("warn", f"{source['lag_ms'] / 1000:.1f} s behind")


def _feedback(source: Source) -> Seen | None:
    doubts = source.get("feedback", {}).get("doubts", 0)
    return Seen("warn", f"wrong too often {doubts} times") if doubts else None


def _blocks(source: Source) -> int:
    return sum(source["blocks"].values())


SOURCE_CHECKS: Final = (
    SourceCheck(
        "listing",
        _lists,
        "no engine that was registered by HTTP fails to list its publishers",
        "start the engine with enable_kv_cache_events (vLLM 0.31 or later lists), or register its tcp:// endpoint",
    ),
    SourceCheck(
        "live",
        _live,
        "all sources are heard",
        "see whether the engine runs and its endpoint can be reached from here; unregister what is gone for good",
    ),
    SourceCheck(
        "events",
        _events,
        "an event has come from each source",
        "fine before the first request; else see enable_kv_cache_events, prefix caching, and the port",
    ),
    SourceCheck(
        "block size",
        _block_size,
        "events have the registered block sizes",
        "register the source with the block size of its events; queries that name the other one find nothing",
    ),
    SourceCheck(
        "sound",
        _sound,
        "nothing is claimed that may be gone",
        "with a replay endpoint it is repaired; without one a reset or restart of the engine settles it",
    ),
    SourceCheck(
        "complete",
        _complete,
        "all that is held is known",
        "answers can only be too low; a replay endpoint and a larger buffer_steps prevent it",
    ),
    SourceCheck(
        "poison",
        _poison,
        "all events can be read",
        "is it the right port, and an engine that is supported? the service's log names the messages",
    ),
    SourceCheck(
        "gaps",
        _gaps,
        "no message is missing for good",
        "messages were lost: give the source a replay endpoint, look at the network, raise receive_hwm",
    ),
    SourceCheck(
        "orphans",
        _orphans,
        "blocks have their places",
        "the events with their tokens were missed: replay endpoint, or register engines before their first request",
    ),
    SourceCheck(
        "replay",
        _replay,
        "losses can be repaired: every source has a replay endpoint",
        "set replay_endpoint in the engine's kv-events-config, and replay in its registration",
    ),
    SourceCheck(
        "lag",
        _lag,
        "events are applied as they come",
        "the service has too little CPU, or an engine sends a burst: see kvindexer's metrics",
    ),
    SourceCheck(
        "feedback",
        _feedback,
        "engines report what was predicted, or report nothing",
        "do the engine's requests carry LoRAs, salts or images that the queries don't name? see POST /v1/explain",
    ),
)


def findings(health: Mapping[str, Any], sources: Sequence[Source], version: str, own_version: str) -> list[Finding]:
    """Everything that was looked at, in the order in which it is worth reading.

    Raises LookupError, TypeError or AttributeError if the answers have another form than those of this version.
    """
    return [
        _version(version, own_version),
        _ready(health),
        _registered(sources),
        *(_of_sources(check, sources) for check in SOURCE_CHECKS),
        _identities(sources),
        _store(health["store"]),
        *_access(health.get("access", ())),
        Finding("ok", "clocks", "not needed: no time of another machine is ever compared"),
    ]


def _version(version: str, own_version: str) -> Finding:
    if version == own_version:
        return Finding("ok", "version", version)
    return Finding(
        "warn",
        "version",
        f"the service is {version}, this command {own_version}",
        "run the command of the service's version",
    )


def _ready(health: Mapping[str, Any]) -> Finding:
    if health["ready"]:
        return Finding("ok", "ready", "queries are answered from a warm index")
    return Finding(
        "fail",
        "ready",
        "the service is starting, or was told to end",
        "wait for sync_deadline_s; see below which sources are not in sync",
    )


def _registered(sources: Sequence[Source]) -> Finding:
    if not sources:
        return Finding(
            "warn", "sources", "none is registered", "name engines in the settings, or POST /register: see the README"
        )
    models = len({(source["tenant"], source["model"]) for source in sources})
    return Finding("ok", "sources", f"{len(sources)}, of {models} model{'s' * (models != 1)}")


def _of_sources(check: SourceCheck, sources: Sequence[Source]) -> Finding:
    seen = [(source, found) for source in sources if (found := check.look(source)) is not None]
    if not seen:
        return Finding("ok", check.check, check.good)
    level: Level = "fail" if any(found.level == "fail" for _, found in seen) else "warn"
    seen.sort(key=lambda pair: pair[1].level != "fail")
    told = [f"{source['instance']} ({source['source']}): {found.what}" for source, found in seen[:MOST_NAMED]]
    rest = [f"and {len(seen) - MOST_NAMED} more"] if len(seen) > MOST_NAMED else []
    return Finding(
        level,
        check.check,
        "; ".join((f"{len(seen)} of {len(sources)}", *told, *rest)),
        check.advice,
        tuple(source["source"] for source, _ in seen),
    )


def _identities(sources: Sequence[Source]) -> Finding:
    """Names and addresses that stand for more than one thing."""
    owners: dict[str, set[tuple[str, str]]] = defaultdict(set)
    spellings: dict[str, set[str]] = defaultdict(set)
    publishers: dict[str, set[str]] = defaultdict(set)
    for source in sources:
        name, place = str(source["instance"]), str(source["source"])
        owners[name].add((source["tenant"], source["model"]))
        spellings[name.strip().lower()].add(name)
        publishers[place.strip().lower().removesuffix("/")].add(place)
    several = [f"{name} serves {len(of)} models or tenants" for name, of in owners.items() if len(of) > 1]
    alike = [*_alike("instances", spellings.values()), *_alike("sources", publishers.values())]
    if not several and not alike:
        return Finding("ok", "identities", "every instance has one name, and every name one instance")
    told = several + alike
    rest = [f"and {len(told) - MOST_NAMED} more"] if len(told) > MOST_NAMED else []
    return Finding(
        "warn",
        "identities",
        "; ".join((*told[:MOST_NAMED], *rest)),
        "give each server a name of its own: state and feedback belong to names, and schedulers must know them",
    )


def _alike(what: str, groups: Iterable[set[str]]) -> list[str]:
    return [f"{what} {', '.join(sorted(group))} differ only in spelling" for group in groups if len(group) > 1]


def _access(problems: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Files and servers that decide who comes in: only what is wrong with them is worth a line."""
    return [Finding("warn", "access", problem["message"], problem["hint"]) for problem in problems]


def _store(store: Mapping[str, Any]) -> Finding:
    kind, problems = store["kind"], store["problems"]
    if kind == "memory":
        return Finding("ok", "store", "memory: the index lives in this process alone")
    if not problems and store["reachable"]:
        return Finding("ok", "store", f"{kind}, {store['replicas']} replicas were heard lately")
    what = "; ".join(f"{problem['message']} ({problem['reason']})" for problem in problems[:MOST_NAMED])
    hints = dict.fromkeys(problem["hint"] for problem in problems[:MOST_NAMED] if problem["hint"])
    return Finding(
        "warn",
        "store",
        what or f"{kind} can't be reached",
        "; ".join(hints) or "queries go on without it; a restarted replica would start cold",
    )
