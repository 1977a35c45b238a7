"""What all pods together mean: which sources there should be, whom to ask, and what is wrong.

Two pods can claim one address (on the host's network, or while an address changes hands) or one name (a slip in an
annotation).  The older one keeps it, for it was there first and two processes can't publish at one address; the
other one is a problem that says so.

Invariant: the same pods make the same plan, in whatever order they came; no endpoint and no instance's rank is given
to two pods.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from kvindexer.events.discovery.pods import Pod
from kvindexer.events.discovery.reading import Answer, Ask, Follow, Reading, Refused, read_pod
from kvindexer.events.finding import FindingProblem
from kvindexer.settings.discovering import Discovering
from kvindexer.types import SourceSpec

Holder = tuple[str, str, str, int, str]


class Chosen(NamedTuple):
    """The pods of one selector, and the ports that their InferencePool names."""

    pods: Collection[Pod]
    ports: tuple[int, ...] = ()


class Plan(NamedTuple):
    """What should be."""

    wanted: dict[str, SourceSpec]
    """By endpoint."""
    owners: dict[str, str]
    """Endpoint -> pod."""
    questions: dict[str, Ask]
    """Life -> what its engine has to be asked, answered or not."""
    problems: list[FindingProblem]
    pods: int


class _Known(NamedTuple):
    """How a pod was read, and what of."""

    pod: Pod
    ports: tuple[int, ...]
    answer: Answer | None
    question: Ask | None
    reading: Reading


class Planner:
    """Makes plans; a pod that is the same as before is not read again, for most of thousands are."""

    def __init__(self, rules: Discovering) -> None:
        self._rules = rules
        self._known: dict[str, _Known] = {}

    def plan(self, chosen: Iterable[Chosen], answers: Mapping[str, Answer]) -> Plan:
        """`answers` are those of engines, by life."""
        pods: dict[str, tuple[Pod, tuple[int, ...]]] = {}
        for one in chosen:
            for pod in one.pods:
                known = pods.get(pod.uid)
                pods[pod.uid] = (pod, one.ports or (known[1] if known else ()))
        ordered = sorted(pods.values(), key=lambda entry: (entry[0].metadata.creationTimestamp or "", entry[0].uid))
        plan, most = Plan({}, {}, {}, [], len(ordered)), self._rules.discovery_max_pods
        if len(ordered) > most:
            message = f"{len(ordered)} pods are chosen, {most} are looked at"
            hint = "narrow the selector, or raise discovery_max_pods"
            plan.problems.append(FindingProblem("too_many_pods", "all", message, hint))
        read = {pod.uid: self._read(pod, ports, answers) for pod, ports in ordered[:most]}
        holders: dict[Holder, str] = {}
        for known_pod in read.values():
            if known_pod.question is not None:
                plan.questions[known_pod.question.life] = known_pod.question
            _add(plan, holders, known_pod.pod, known_pod.reading)
        self._known = read
        return plan

    def _read(self, pod: Pod, ports: tuple[int, ...], answers: Mapping[str, Answer]) -> _Known:
        """Read a pod, with its engine's answer if that is needed and there is one."""
        known = self._known.get(pod.uid)
        if known is not None and known.pod is pod and known.ports == ports:
            answer = None if known.question is None else answers.get(known.question.life)
            if answer == known.answer:
                return known
        reading = read_pod(pod, self._rules, ports)
        if not isinstance(reading, Ask):
            return _Known(pod, ports, None, None, reading)
        answer = answers.get(reading.life)
        told = reading if answer is None else read_pod(pod, self._rules, ports, answer)
        return _Known(pod, ports, answer, reading, told)


def _add(plan: Plan, holders: dict[Holder, str], pod: Pod, reading: Reading) -> None:
    if isinstance(reading, Refused):
        plan.problems.append(reading.problem)
    if not isinstance(reading, Follow):
        return
    plan.problems.extend(reading.notes)
    for spec in reading.specs:
        other = plan.owners.get(spec.endpoint) or holders.get(_holder(spec))
        if other is not None:
            plan.problems.append(_claimed(pod, spec, other))
            return
    for spec in reading.specs:
        plan.wanted[spec.endpoint] = spec
        plan.owners[spec.endpoint] = pod.where
        holders[_holder(spec)] = pod.where


def _holder(spec: SourceSpec) -> Holder:
    return (spec.tenant, spec.model, spec.instance, spec.rank, spec.type)


def _claimed(pod: Pod, spec: SourceSpec, other: str) -> FindingProblem:
    message = f"claims {spec.endpoint} and instance {spec.instance}, as the older pod {other} does"
    hint = "give each its own address, ports, or instance annotation; the older one is followed"
    return FindingProblem("duplicate", pod.where, message, hint)
