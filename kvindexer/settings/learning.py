"""What callers tell: where they sent prompts, what engines reported, what is asked for most."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, Field

from kvindexer.settings.values import Count, Seconds, no_boolean
from kvindexer.tiering.feedback import MAX_REMEMBERED


class Learning(BaseModel):
    """Speculation, feedback and heat."""

    speculative_ttl_s: Seconds = Field(
        default=2.0,
        description="Seconds that a prompt told to /v1/routed counts as held, unless its request says otherwise.",
    )
    max_speculative_blocks: Count = Field(
        default=262_144,
        description="Most blocks of prompts told to /v1/routed at once; past it those that end first go.",
    )
    feedback_window_s: Seconds = Field(
        default=60.0,
        description="Seconds that a report to /v1/feedback counts in the verdict on its source.",
    )
    feedback_min_reports: Annotated[int, BeforeValidator(no_boolean)] = Field(
        default=8,
        gt=0,
        le=MAX_REMEMBERED,
        description="Fewest reports within the window for a verdict on a source.",
    )
    feedback_wrong_share: Annotated[float, BeforeValidator(no_boolean)] = Field(
        default=0.5,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="Share of reports in the window that were over-predicted, by more than a block, from which on a "
        "source loses its flags and is verified anew.",
    )
    feedback_pause_s: Seconds = Field(
        default=300.0,
        description="Seconds after such a verdict in which there is no other one on the source.",
    )
    max_heat_blocks: Count = Field(
        default=32_768,
        description="Most blocks whose heat is counted, of all keyspaces together; past it the coldest go.",
    )
    heat_half_life_s: Seconds = Field(
        default=600.0,
        description="Seconds after which a question counts half in the heat of its blocks.",
    )
    heat_blocks_per_s: Count = Field(
        default=200_000,
        description="Most blocks of questions counted a second; past it prompts are left out and estimated. A run of "
        "fewer than 16 blocks between two places where prompts part counts as 16; 200,000 take 1 to 2 % of a core.",
    )
