"""How large, how many and how slow requests may be."""

from __future__ import annotations

from pydantic import BaseModel, Field

from kvindexer.settings.values import MIB, Bytes, Count, Seconds


class Requests(BaseModel):
    """Requests."""

    max_body_bytes: Bytes = Field(
        default=32 * MIB,
        description="Largest request body in bytes; a larger one is answered with 413.",
    )
    max_prompt_tokens: Count = Field(
        default=1_048_576,
        description="Longest prompt of a query in tokens; a longer one is answered with 413.",
    )
    max_text_bytes: Bytes = Field(
        default=8 * MIB,
        description="Longest text of a query in bytes (`prompt`, or `messages` as JSON); a longer one is answered "
        "with 413.",
    )
    max_candidates: Count = Field(
        default=10_000,
        description="Most candidates that a query may name; more are answered with 413.",
    )
    max_batch: Count = Field(
        default=256,
        description="Most prompts of one batch; more are answered with 413.",
    )
    max_batch_tokens: Count = Field(
        default=4_194_304,
        description="Most tokens of all prompts of a batch together; more are answered with 413.",
    )
    max_blocks: Count = Field(
        default=4096,
        description="Most blocks of a request to /v1/blocks/locate or /v1/offload/plan; more are answered with 413.",
    )
    max_concurrent_requests: Count = Field(
        default=256,
        description="Most requests worked on at once; more are answered with 503.",
    )
    max_concurrent_texts: Count = Field(
        default=64,
        description="Most queries with text that wait for their tokens at once, and at most half of "
        "max_concurrent_requests; more are answered with 503.",
    )
    max_change_streams: Count = Field(
        default=16,
        description="Most followers of /v1/changes at once, and at most half of max_concurrent_requests; more are "
        "answered with 503.",
    )
    changes_max_bytes: Bytes = Field(
        default=16 * MIB,
        description="Most bytes of recent changes kept for followers of /v1/changes; one that falls behind is cut "
        "off, and is given the present content when it comes back.",
    )
    changes_heartbeat_s: Seconds = Field(
        default=10.0,
        description="Seconds between signs of life on /v1/changes when nothing changes; a follower that takes "
        "nothing for twice as long is cut off.",
    )
    receive_timeout_s: Seconds = Field(
        default=10.0,
        description="Seconds that a client may take to send its request; then the answer is 408.",
    )
