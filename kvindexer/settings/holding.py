"""How much the index holds, and what a block is worth where it lies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final

from pydantic import BaseModel, BeforeValidator, Field, field_validator

from kvindexer.errors import SettingsError, UnknownNameError
from kvindexer.settings.source import TIER_NAMES
from kvindexer.settings.values import Count, Weight, from_text

TIER_WEIGHTS: Final = {"gpu": 1.0, "cpu": 0.8, "disk": 0.4, "remote": 0.2}


class Holding(BaseModel):
    """The index."""

    max_entries: Count = Field(
        default=20_000_000,
        description="Most entries (source, tier, block) of the index; past it the least valuable go.",
    )
    max_entries_per_source: Count = Field(
        default=4_000_000,
        description="Most entries of one source; past it its own are dropped and it is not complete.",
    )
    max_orphans_per_source: Count = Field(
        default=65_536,
        description="Most held blocks of a source whose place in a prompt is unknown; then the oldest go.",
    )
    max_dead_bindings_per_source: Count = Field(
        default=65_536,
        description="Most remembered hashes of removed blocks of a source; then the oldest go.",
    )
    max_sources: Count = Field(default=4096, description="Most sources registered at once; one more is refused.")
    media: Annotated[Mapping[str, str], BeforeValidator(from_text)] = Field(
        default={},
        description="Further names of media (in any case) and the tier of each, over the built-in table.",
    )
    tier_weights: Annotated[Mapping[str, Weight], BeforeValidator(from_text)] = Field(
        default=TIER_WEIGHTS,
        description="Worth of a block on each tier against 1.0; a tier that isn't named keeps its own.",
    )

    @field_validator("media")
    @classmethod
    def _known_tiers(cls, value: Mapping[str, str]) -> Mapping[str, str]:
        for medium, tier in value.items():
            if tier.lower() not in TIER_NAMES:
                raise SettingsError(f"media.{medium}", tier, f"one of {', '.join(TIER_NAMES)}")
        return {medium.upper(): tier.lower() for medium, tier in value.items()}

    @field_validator("tier_weights")
    @classmethod
    def _over_the_defaults(cls, value: Mapping[str, float]) -> Mapping[str, float]:
        for tier in value:
            if tier not in TIER_NAMES:
                raise UnknownNameError(f"tier_weights.{tier}", TIER_NAMES, "tier")
        return {**TIER_WEIGHTS, **value}
