"""PromQL for tests: what an expression refers to, and what it says of metrics that were really scraped.

Parsed by `promql-parser`, a port of Prometheus' own.  Evaluated is only what our rules are made of; everything else
raises.  `increase` and `rate` look at the first and the last scrape that there is, whatever the range, without
extrapolation, and count resets; of a series that came up in between nothing is known, as in Prometheus.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, NamedTuple

import promql_parser as promql
from prometheus_client.metrics_core import Metric

Labels = frozenset[tuple[str, str]]
Vector = dict[Labels, float]
Value = float | Vector

COMPARISONS: Final[Mapping[str, Callable[[float, float], bool]]] = {
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
}
ARITHMETIC: Final[Mapping[str, Callable[[float, float], float]]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}


class Scrape(NamedTuple):
    """The samples of one moment; `at_s` is of any monotonic clock."""

    at_s: float
    samples: Mapping[str, Vector]
    """By the sample's full name."""


def scrape_of(families: Sequence[Metric], at_s: float) -> Scrape:
    """What Prometheus would keep of these metrics."""
    samples: dict[str, Vector] = {}
    for family in families:
        for sample in family.samples:
            samples.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return Scrape(at_s, samples)


class Reference(NamedTuple):
    """A metric that an expression names, and the labels that it looks at there."""

    metric: str
    labels: frozenset[str]


def references(expression: str) -> list[Reference]:
    """All of them; labels that are grouped by count for each metric inside."""
    return list(_references(promql.parse(expression), frozenset()))


def _references(node: Any, grouped: frozenset[str]) -> Iterator[Reference]:
    match node:
        case promql.VectorSelector():
            matched = {matcher.name for matcher in node.matchers.matchers}
            yield Reference(str(node.name), grouped | matched)
        case promql.MatrixSelector():
            yield from _references(node.vector_selector, grouped)
        case promql.AggregateExpr():
            inner = grouped | (set(node.modifier.labels) if node.modifier is not None else set())
            yield from _references(node.expr, inner)
        case promql.Call():
            for argument in node.args:
                yield from _references(argument, grouped)
        case promql.BinaryExpr():
            yield from _references(node.lhs, grouped)
            yield from _references(node.rhs, grouped)
        case promql.ParenExpr() | promql.UnaryExpr() | promql.SubqueryExpr():
            yield from _references(node.expr, grouped)
        case promql.NumberLiteral() | promql.StringLiteral():
            return
        case _:
            raise NotImplementedError(type(node).__name__)


def evaluate(expression: str, history: Sequence[Scrape]) -> Vector:
    """The vector that the expression is at the last scrape; empty: an alert of it would not fire."""
    value = _value(promql.parse(expression), history)
    if isinstance(value, float):
        raise NotImplementedError("a scalar is no alert")
    return value


def _value(node: Any, history: Sequence[Scrape]) -> Value:
    match node:
        case promql.NumberLiteral():
            return float(node.val)
        case promql.ParenExpr():
            return _value(node.expr, history)
        case promql.VectorSelector():
            return _select(node, history[-1])
        case promql.AggregateExpr():
            return _sum(node, history)
        case promql.Call():
            return _call(node, history)
        case promql.BinaryExpr():
            return _binary(node, history)
    raise NotImplementedError(type(node).__name__)


def _select(node: Any, scrape: Scrape) -> Vector:
    if node.offset is not None or node.at is not None:
        raise NotImplementedError("offset")
    found = scrape.samples.get(str(node.name), {})
    return {labels: value for labels, value in found.items() if _fits(dict(labels), node.matchers.matchers)}


def _fits(labels: Mapping[str, str], matchers: Sequence[Any]) -> bool:
    return all(_matches(matcher, labels.get(matcher.name, "")) for matcher in matchers)


def _matches(matcher: Any, value: str) -> bool:
    match str(matcher.op):
        case "MatchOp.Equal":
            return bool(value == matcher.value)
        case "MatchOp.NotEqual":
            return bool(value != matcher.value)
        case "MatchOp.Re":
            return re.fullmatch(matcher.value, value) is not None
        case "MatchOp.NotRe":
            return re.fullmatch(matcher.value, value) is None
    raise NotImplementedError(str(matcher.op))


def _sum(node: Any, history: Sequence[Scrape]) -> Vector:
    if str(node.op) != "sum" or node.modifier is None or str(node.modifier.type) != "AggModifierType.Without":
        raise NotImplementedError(node.prettify())
    value = _value(node.expr, history)
    if isinstance(value, float):
        raise TypeError("the sum of a scalar")
    total: Vector = {}
    for labels, one in value.items():
        rest = frozenset(pair for pair in labels if pair[0] not in node.modifier.labels)
        total[rest] = total.get(rest, 0.0) + one
    return total


def _call(node: Any, history: Sequence[Scrape]) -> Vector:
    match node.func.name, node.args:
        case ("increase" | "rate") as name, [selector]:
            steps = [_select(selector.vector_selector, scrape) for scrape in history]
            grown = {labels: _growth([step[labels] for step in steps if labels in step]) for labels in steps[-1]}
            lasted_s = history[-1].at_s - history[0].at_s
            known = {labels: value for labels, value in grown.items() if value is not None}
            return known if name == "increase" else {labels: value / lasted_s for labels, value in known.items()}
        case "absent", [selector]:
            return {} if _value(selector, history) else {frozenset(): 1.0}
        case "histogram_quantile", [quantile, buckets]:
            share, inside = _value(quantile, history), _value(buckets, history)
            if isinstance(share, float) and not isinstance(inside, float):
                return _quantiles(share, inside)
    raise NotImplementedError(node.prettify())


def _growth(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    return sum(after - before if after >= before else after for before, after in pairwise(values))


def _quantiles(share: float, buckets: Vector) -> Vector:
    """Linear inside a bucket; above the last bound, that bound."""
    grouped: dict[Labels, list[tuple[float, float]]] = {}
    for labels, count in buckets.items():
        rest = frozenset(pair for pair in labels if pair[0] != "le")
        grouped.setdefault(rest, []).append((float(dict(labels)["le"]), count))
    quantiles: Vector = {}
    for labels, rows in grouped.items():
        rows.sort()
        rank = share * rows[-1][1]
        below, lower = 0.0, 0.0
        for bound, count in rows:
            if count >= rank and rows[-1][1]:
                inside = (rank - below) / (count - below) if count > below else 0.0
                quantiles[labels] = lower if bound == float("inf") else lower + (bound - lower) * inside
                break
            below, lower = count, bound
    return quantiles


def _binary(node: Any, history: Sequence[Scrape]) -> Value:
    if node.modifier is not None and (node.modifier.matching is not None or node.modifier.return_bool):
        raise NotImplementedError(node.prettify())
    sign = str(node.op)
    left, right = _value(node.lhs, history), _value(node.rhs, history)
    if sign == "and" and not isinstance(left, float) and not isinstance(right, float):
        return {labels: value for labels, value in left.items() if labels in right}
    if isinstance(left, float) and isinstance(right, float):
        return ARITHMETIC[sign](left, right)
    pairs = list(_pairs(left, right))
    if sign in COMPARISONS:
        holds = COMPARISONS[sign]
        return {
            labels: (one if not isinstance(left, float) else other)
            for labels, one, other in pairs
            if holds(one, other)
        }
    return {labels: ARITHMETIC[sign](one, other) for labels, one, other in pairs}


def _pairs(left: Value, right: Value) -> Iterator[tuple[Labels, float, float]]:
    if isinstance(left, float):
        if not isinstance(right, float):
            yield from ((labels, left, value) for labels, value in right.items())
    elif isinstance(right, float):
        yield from ((labels, value, right) for labels, value in left.items())
    else:
        yield from ((labels, value, right[labels]) for labels, value in left.items() if labels in right)
