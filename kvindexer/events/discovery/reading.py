"""What one pod means: the sources that it publishes, a question that only its engine can answer, or what is wrong.

    read_pod(pod, rules, ports of its InferencePool, the engine's answer) ─► Idle | Ask | Follow | Refused

What a pod says of itself goes before what the settings say of all pods, and that before what the engine says:

    model         kvindexer.io/model, discovery_model, GET /v1/models
    event port    kvindexer.io/event-port, a container port named kv-events, discovery_event_port,
                  GET /kv_event_sources, 5557
    replay port   kvindexer.io/replay-port, a container port named kv-replay, discovery_replay_port,
                  GET /kv_event_sources, none
    HTTP port     kvindexer.io/http-port, the InferencePool's targetPorts, discovery_http_port

Each rank publishes one port further than the rank before, as vLLM and llm-d count.  Several HTTP ports are as many
engines, each with its own rank.  A pod is named as schedulers know it, by address and port; its names are aliases.

Invariant: a source's `life` is the pod and the run of its container.  Whatever is told of one life is never believed
of another, however the pod is called and whatever address it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from kvindexer.errors import SettingsError
from kvindexer.events.discovery.pods import Container, ContainerStatus, Pod
from kvindexer.events.finding import FindingProblem
from kvindexer.hiding import short
from kvindexer.settings.discovering import Discovering
from kvindexer.settings.source import source_of
from kvindexer.types import SourceSpec

PREFIX: Final = "kvindexer.io/"
EVENT_PORT_NAME: Final = "kv-events"
REPLAY_PORT_NAME: Final = "kv-replay"
DEFAULT_EVENT_PORT: Final = 5557
"""Of vLLM, and of llm-d's `socketPort`."""
ENGINE_LABELS: Final = ("llm-d.ai/engine-type", "inference.networking.k8s.io/engine-type")
"""By which llm-d's router tells SGLang from vLLM; the second one is the older one."""
CONTAINER_ANNOTATION: Final = "kubectl.kubernetes.io/default-container"
MAX_RANKS: Final = 1024
_PORTS: Final = 2**16

_PLACING: Final = ("follow", "container", "event-port", "replay-port", "http-port", "ranks", "instance", "aliases")
"""What decides where a pod is dialled and what it is called."""
_MEANING: Final = {
    name.replace("_", "-"): name
    for name in (
        "model", "block_size", "tenant", "type", "topic", "lora", "report_mode", "offload_blocks_per_chunk",
        "offload_connector", "speculative_blocks", "clear_lower_tiers", "durable_tiers", "block_bytes",
    )
}  # fmt: skip
"""Fields of a source that a pod may give, by the names that they have there."""


class Answer(NamedTuple):
    """What an engine said."""

    model: str | None
    """Its model; None: it named none."""
    lists: bool
    """Whether it lists its publishers."""


class Idle(NamedTuple):
    """Nothing to follow, and nothing wrong."""


class Ask(NamedTuple):
    """The engine has to be asked first."""

    life: str
    where: str
    """The pod."""
    url: str
    for_model: bool
    for_ports: bool


class Follow(NamedTuple):
    """The pod's sources."""

    specs: tuple[SourceSpec, ...]
    notes: tuple[FindingProblem, ...]
    """What is strange, and no reason not to follow it."""


class Refused(NamedTuple):
    """The pod can't be followed."""

    problem: FindingProblem


Reading = Idle | Ask | Follow | Refused


class _UnusableError(Exception):
    """What a pod says of itself can't be used."""

    def __init__(self, name: str, value: object, expected: str) -> None:
        super().__init__(f"{PREFIX}{name} is {short(value)!r}, expected {expected}")


class _Engine(NamedTuple):
    """One HTTP server of a pod, and the ranks behind it."""

    http_port: int
    first_rank: int
    ranks: int


def read_pod(
    pod: Pod, rules: Discovering, target_ports: tuple[int, ...] = (), answer: Answer | None = None
) -> Reading:
    """See the module's head; never raises."""
    said = _said(pod)
    if said.get("follow", "").strip().lower() == "false":
        return Idle()
    life = _life(pod, said)
    if not life or pod.metadata.deletionTimestamp or pod.status is None or not pod.status.podIP:
        return Idle()
    try:
        return _read(_Place(pod, said, rules, target_ports), life, rules, answer)
    except _UnusableError as error:
        return Refused(FindingProblem("bad_annotation", pod.where, str(error), "docs/discovery.md lists them all"))


def _said(pod: Pod) -> dict[str, str]:
    """What a pod says of itself to us, by name without the prefix; an annotation goes before a label."""
    found: dict[str, str] = {}
    for given in (pod.metadata.labels, pod.metadata.annotations):
        found |= {key.removeprefix(PREFIX): text for key, text in (given or {}).items() if key.startswith(PREFIX)}
    return found


def _life(pod: Pod, said: Mapping[str, str]) -> str:
    """The pod and the run of its engine's container; empty: it doesn't run."""
    status = pod.status
    if status is None or status.phase != "Running":
        return ""
    statuses = {one.name: one for one in status.containerStatuses or ()}
    container = _container(pod, said)
    one = statuses.get(container.name) if container is not None else None
    if one is None or one.state is None or one.state.running is None:
        return ""
    return f"{pod.uid}/{_run(one)}"


def _run(status: ContainerStatus) -> str:
    """Different for each start of a container."""
    started = status.state.running.startedAt if status.state and status.state.running else None
    return (status.containerID or f"{status.restartCount}@{started or ''}").rpartition("/")[2]


def _container(pod: Pod, said: Mapping[str, str]) -> Container | None:
    """The one that the engine runs in: named, or the one that declares its port, or the pod's main one."""
    containers = (pod.spec.containers if pod.spec is not None else None) or ()
    named = said.get("container", "").strip()
    if named:
        return next((one for one in containers if one.name == named), None)
    for one in containers:
        if any(port.name == EVENT_PORT_NAME for port in one.ports or ()):
            return one
    main = (pod.metadata.annotations or {}).get(CONTAINER_ANNOTATION)
    return next((one for one in containers if one.name == main), containers[0] if containers else None)


class _Place:
    """Where a pod's publishers and HTTP servers are.  Raises _UnusableError."""

    def __init__(self, pod: Pod, said: Mapping[str, str], rules: Discovering, target_ports: tuple[int, ...]) -> None:
        if said.get("follow", "true").strip().lower() != "true":
            raise _UnusableError("follow", said["follow"], "true or false")
        self.pod, self.said = pod, said
        container = _container(pod, said)
        declared = {port.name: port.containerPort for port in (container.ports if container else None) or ()}
        address = (pod.status.podIP if pod.status is not None else None) or ""
        self.host = f"[{address}]" if ":" in address else address
        self.event_port = _port(said, "event-port") or declared.get(EVENT_PORT_NAME) or rules.discovery_event_port
        self.replay_port: int | None = None
        if said.get("replay-port", "").strip().lower() != "none":
            replay_port = _port(said, "replay-port") or declared.get(REPLAY_PORT_NAME)
            self.replay_port = replay_port or rules.discovery_replay_port
        self.engines = _engines(said, target_ports or (rules.discovery_http_port,))
        self.last = max(engine.first_rank + engine.ranks for engine in self.engines) - 1

    def check(self, event_port: int) -> None:
        """Whether all ranks fit between the ports."""
        for name, port in (("event-port", event_port), ("replay-port", self.replay_port)):
            if port is not None and port + self.last >= _PORTS:
                raise _UnusableError(name, port, f"room for {self.last + 1} ranks up to port {_PORTS - 1}")
        if self.replay_port is not None and abs(self.replay_port - event_port) <= self.last:
            expected = f"more than {self.last} ports away from the event port {event_port}"
            raise _UnusableError("replay-port", self.replay_port, expected)


def _engines(said: Mapping[str, str], default_ports: tuple[int, ...]) -> list[_Engine]:
    ranks = _number(said, "ranks", MAX_RANKS) or 1
    http_ports = default_ports
    if "http-port" in said:
        http_ports = tuple(
            _number({"http-port": text}, "http-port", _PORTS - 1) for text in _listed(said["http-port"])
        )
    if not http_ports or len(set(http_ports)) < len(http_ports):
        raise _UnusableError("http-port", said.get("http-port", ""), "one port, or different ones")
    if len(http_ports) == 1:
        return [_Engine(http_ports[0], 0, ranks)]
    if "ranks" in said and ranks != len(http_ports):
        raise _UnusableError(
            "ranks", said["ranks"], f"{len(http_ports)}, as many as there are HTTP ports, or nothing"
        )
    return [_Engine(port, rank, 1) for rank, port in enumerate(http_ports)]


def _port(said: Mapping[str, str], name: str) -> int | None:
    return _number(said, name, _PORTS - 1) if name in said else None


def _number(said: Mapping[str, str], name: str, most: int) -> int:
    """A number from 1 on; 0 if there is none."""
    text = said.get(name, "0").strip()
    number = int(text) if text.isascii() and text.isdigit() and len(text) <= len(str(most)) else -1
    if name in said and not 0 < number <= most:
        raise _UnusableError(name, said[name], f"a number from 1 to {most}")
    return number


def _listed(text: str) -> tuple[str, ...]:
    return tuple(filter(None, map(str.strip, text.split(","))))


def _read(place: _Place, life: str, rules: Discovering, answer: Answer | None) -> Reading:
    pod, said = place.pod, place.said
    model = said.get("model", "").strip() or rules.discovery_model
    url = f"http://{place.host}:{place.engines[0].http_port}"
    if answer is None and (not model or place.event_port is None):
        return Ask(life, pod.where, url, for_model=not model, for_ports=place.event_port is None)
    if not model and (answer is None or not answer.model):
        hint = f"give the pod the annotation {PREFIX}model, or set discovery_model"
        return Refused(FindingProblem("no_model", pod.where, f"{url}/v1/models names no model", hint))
    values = _values(said, pod, rules) | {"model": model or (answer.model if answer else None), "life": life}
    if place.event_port is None and answer is not None and answer.lists:
        where: list[tuple[_Engine, int, str, str | None]] = [
            (engine, 0, f"http://{place.host}:{engine.http_port}", None) for engine in place.engines
        ]
    else:
        event_port = place.event_port or DEFAULT_EVENT_PORT
        place.check(event_port)
        where = [
            (engine, rank, f"tcp://{place.host}:{event_port + rank}", _replay(place, rank))
            for engine in place.engines
            for rank in range(engine.first_rank, engine.first_rank + engine.ranks)
        ]
    specs = tuple(
        _spec({**values, "endpoint": endpoint, "replay": replay, "rank": rank}, place, engine)
        for engine, rank, endpoint, replay in where
    )
    return Follow(specs, tuple(_strange(pod, said)))


def _replay(place: _Place, rank: int) -> str | None:
    return None if place.replay_port is None else f"tcp://{place.host}:{place.replay_port + rank}"


def _values(said: Mapping[str, str], pod: Pod, rules: Discovering) -> dict[str, object]:
    """What the pod's events mean."""
    labels = pod.metadata.labels or {}
    engine = next((labels[label] for label in ENGINE_LABELS if labels.get(label)), "").lower()
    values: dict[str, object] = {
        "tenant": rules.discovery_tenant,
        "block_size": rules.discovery_block_size,
        "type": "sglang" if engine == "sglang" else "vllm",
    }
    for name, field in _MEANING.items():
        if name in said:
            values[field] = _listed(said[name]) if field == "durable_tiers" else said[name].strip()
    return values


def _spec(values: Mapping[str, object], place: _Place, engine: _Engine) -> SourceSpec:
    """One source, checked as those of the settings are."""
    pod, said = place.pod, place.said
    instance = said.get("instance", "").strip() or f"{place.host}:{engine.http_port}"
    names = [f"{pod.metadata.name}-rank-{engine.first_rank}"]
    if len(place.engines) == 1:
        names.insert(0, pod.metadata.name)
    elif "instance" in said:
        raise _UnusableError("instance", said["instance"], "no name, for its HTTP ports are several instances")
    aliases = [*names, *(f"{pod.metadata.namespace or 'default'}/{name}" for name in names)]
    if "instance" in said:
        aliases.append(f"{place.host}:{engine.http_port}")
    aliases += _listed(said.get("aliases", ""))
    given = {**values, "instance": instance, "aliases": tuple(dict.fromkeys(aliases))}
    try:
        return source_of(given, "pod")
    except SettingsError as error:
        field = error.key.removeprefix("pod.")
        raise _UnusableError(field.replace("_", "-"), error.value, error.expected) from None


def _strange(pod: Pod, said: Mapping[str, str]) -> list[FindingProblem]:
    """Names that mean nothing to us are slips, most of the time."""
    unknown = sorted(set(said) - {*_PLACING, *_MEANING})
    if not unknown:
        return []
    listed = ", ".join(f"{PREFIX}{name}" for name in unknown[:8])
    hint = f"known are {', '.join((*_PLACING, *_MEANING))}"
    return [FindingProblem("unknown_annotation", pod.where, f"no meaning has {listed}", hint, serious=False)]
