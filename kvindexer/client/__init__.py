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
    ReadyAnswer,
    Registered,
    RoutedAnswer,
    SingleAnswer,
    SourceEntry,
    SourcesAnswer,
    Unregistered,
)
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
from kvindexer.client.prompts import Chat, Keys, Prompt, Text, Tokens
from kvindexer.tokenization.extras import MultimodalItem
from kvindexer.types import SourceSpec

__all__ = [
    "AsyncClient",
    "BadAnswerError",
    "BatchAnswer",
    "BatchResult",
    "Chat",
    "Client",
    "ClientError",
    "FeedbackAnswer",
    "HotPrefix",
    "InvalidRequestError",
    "Keys",
    "KeysAnswer",
    "LocateAnswer",
    "LocatedBlock",
    "Match",
    "MatchAnswer",
    "MultimodalItem",
    "NotFoundError",
    "PlanAnswer",
    "PlannedBlock",
    "PrefixesAnswer",
    "PrewarmAnswer",
    "Prompt",
    "ReadyAnswer",
    "RefusedError",
    "Registered",
    "RoutedAnswer",
    "SingleAnswer",
    "SourceEntry",
    "SourceSpec",
    "SourcesAnswer",
    "Text",
    "TimedOutError",
    "Tokens",
    "UnavailableError",
    "UnreachableError",
    "Unregistered",
]
