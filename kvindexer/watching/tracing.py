"""What may be traced, and how it is when nothing is: as it was.

Parts of the service are handed through `Tracing` once, when it is put together.  Without a collector each comes back
as the very object that went in, so that traces that are off cost nothing; `watching.spans` hands out wrappers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Final, Literal

from starlette.types import ASGIApp

from kvindexer.index.seam import Index
from kvindexer.store.server import ShardServer
from kvindexer.tokenization.tokenizer import Tokenizer

SpanOutcome = Literal["sent", "failed"]
SPAN_OUTCOMES: Final[tuple[SpanOutcome, ...]] = ("failed", "sent")

CountSpans = Callable[[SpanOutcome, int], None]


class Tracing:
    """No traces."""

    def requests(self, app: ASGIApp) -> ASGIApp:
        """The application, with a span for each request."""
        return app

    def index(self, index: Index) -> Index:
        """The index as queries see it, with a span for each walk."""
        return index

    def tokenizer(self, model: str, tokenizer: Tokenizer) -> Tokenizer:
        """A model's tokenizer, with a span for each text."""
        del model
        return tokenizer

    def server(self, server: ShardServer) -> ShardServer:
        """The durable copy's server, with a span for each call."""
        return server

    def running(self) -> AbstractAsyncContextManager[None]:
        """At its end, what waits is sent, if that does not take too long."""
        return nullcontext()
