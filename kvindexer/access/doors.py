"""Every route, the role that opens it, and whose blocks its answers show.  Data only.

A path that has no row here has no door: while callers must say who they are it is answered as if it did not exist,
so a route that is forgotten is shut, not open.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

from kvindexer.access.identity import Role

Shows = Literal["own", "every salt", "every tenant"]
"""What answers are made of.  `own`: of the caller's tenant and cache salt.  `every salt`: of its tenant, whatever the
cache salt.  `every tenant`: of everybody; such a route is shut for callers that are bound to a tenant."""


class Door(NamedTuple):
    """One route's door."""

    role: Role | None
    """None: open to everybody."""
    shows: Shows = "own"


DOORS: Final[dict[str, Door]] = {
    # probes: a kubelet has no token; without a role /health names nobody
    "/health": Door(None),
    "/ready": Door(None),
    "/metrics": Door("query", "every tenant"),
    # what schedulers ask and tell for each request
    "/v1/match": Door("query"),
    "/v1/match/batch": Door("query"),
    "/v1/keys": Door("query"),
    "/v1/explain": Door("query"),
    "/v1/routed": Door("query"),
    "/v1/feedback": Door("query"),
    "/query": Door("query"),
    "/query_by_hash": Door("query", "every salt"),
    "/score_completions": Door("query"),
    "/score_chat_completions": Door("query"),
    # what managers of caches ask
    "/v1/blocks/locate": Door("query", "every salt"),
    "/v1/offload/plan": Door("query", "every salt"),
    "/v1/changes": Door("query", "every salt"),
    "/v1/tiers": Door("query"),
    "/v1/heat/prefixes": Door("query", "every salt"),
    "/v1/heat/single": Door("query", "every salt"),
    "/v1/heat/prewarm": Door("query", "every salt"),
    # which sources there are
    "/v1/sources": Door("query"),
    "/workers": Door("query"),
    "/register": Door("register"),
    "/unregister": Door("register"),
    # what the routes are
    "/docs": Door("query"),
    "/openapi.json": Door("query"),
}
