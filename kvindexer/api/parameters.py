"""Names as parameters of a URL: bounded like those in bodies (`api.schemas`)."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query

from kvindexer.api.schemas import MAX_NAME

GivenName = Annotated[str, Query(min_length=1, max_length=MAX_NAME)]
"""One without which there is no answer."""
ChosenName = Annotated[str | None, Query(max_length=MAX_NAME)]
"""One that narrows the answer."""
