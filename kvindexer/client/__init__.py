"""Ask kvindexer from Python: blocking or with asyncio, typed, every wait bounded.

    with Client("http://localhost:8090") as client:
        answer = client.match("m", Tokens(token_ids), candidates=pods, top_k=3)
        best = answer.matches[0]
        client.routed("m", best.instance, Tokens(token_ids))

One set of routes (`calls`) and of rules for what comes back (`exchange`); two thin clients around them (`clients`).
Importing this imports no server.
"""

from __future__ import annotations

from kvindexer.client.answers import (
    BatchAnswer,
    BatchResult,
    FeedbackAnswer,
    HotPrefix,
    KeysAnswer,
    LocateAnswer,
    LocatedBlock,
    Match,
    MatchAnswer,
    PlanAnswer,
    PlannedBlock,
    PrefixesAnswer,
    PrewarmAnswer,
    Registered,
    RoutedAnswer,
    SingleAnswer,
    Unregistered,
)
from kvindexer.client.changes import BlocksEvent, Change, EndEvent, GoneEvent, PositionEvent, ResetEvent, StoredBlock
from kvindexer.client.clients import AsyncClient, Client
from kvindexer.client.errors import (
    BadAnswerError,
    ClientError,
    InvalidRequestError,
    NotFoundError,
    RefusedError,
    TimedOutError,
    UnavailableError,
    UnreachableError,
)
from kvindexer.client.following import AsyncChanges, Changes
from kvindexer.client.prompts import Chat, Keys, Prompt, Text, Tokens
from kvindexer.client.reports import (
    ExplainAnswer,
    Explained,
    HealthAnswer,
    ModelTiers,
    ReadyAnswer,
    SourceEntry,
    SourcesAnswer,
    TiersAnswer,
)
from kvindexer.tokenization.extras import MultimodalItem
from kvindexer.types import SourceSpec

__all__ = [
    "AsyncChanges",
    "AsyncClient",
    "BadAnswerError",
    "BatchAnswer",
    "BatchResult",
    "BlocksEvent",
    "Change",
    "Changes",
    "Chat",
    "Client",
    "ClientError",
    "EndEvent",
    "ExplainAnswer",
    "Explained",
    "FeedbackAnswer",
    "GoneEvent",
    "HealthAnswer",
    "HotPrefix",
    "InvalidRequestError",
    "Keys",
    "KeysAnswer",
    "LocateAnswer",
    "LocatedBlock",
    "Match",
    "MatchAnswer",
    "ModelTiers",
    "MultimodalItem",
    "NotFoundError",
    "PlanAnswer",
    "PlannedBlock",
    "PositionEvent",
    "PrefixesAnswer",
    "PrewarmAnswer",
    "Prompt",
    "ReadyAnswer",
    "RefusedError",
    "Registered",
    "ResetEvent",
    "RoutedAnswer",
    "SingleAnswer",
    "SourceEntry",
    "SourceSpec",
    "SourcesAnswer",
    "StoredBlock",
    "Text",
    "TiersAnswer",
    "TimedOutError",
    "Tokens",
    "UnavailableError",
    "UnreachableError",
    "Unregistered",
]
