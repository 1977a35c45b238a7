"""The durable, shared copy of the index."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, BeforeValidator, Field, SecretStr, model_validator

from kvindexer.errors import SettingsError
from kvindexer.hiding import HIDDEN
from kvindexer.settings.values import MIB, Bytes, Name, Seconds
from kvindexer.store.address import StoreAddress, read_address
from kvindexer.store.password import password_in


class Storing(BaseModel):
    """The store."""

    store: Annotated[StoreAddress, BeforeValidator(read_address)] = Field(
        default=StoreAddress(),
        description="Where the durable, shared copy of the index lives: `memory` for nowhere, or the URL of a Redis "
        "or Valkey (see below).",
    )
    store_password: SecretStr | None = Field(
        default=None,
        description="Password for the store, if it isn't in the URL.",
    )
    store_password_file: Path | None = Field(
        default=None,
        description="File with the password for the store; read again for every new connection.",
    )
    store_namespace: Name = Field(
        default="kvindexer",
        min_length=1,
        description="First part of all our keys, of letters, digits, `-`, `_` and `.`; replicas of one deployment "
        "have the same, deployments that share a Redis each their own.",
    )
    store_timeout_s: Seconds = Field(
        default=1.0,
        description="Seconds that the store may take to accept a connection, and to answer a command.",
    )
    store_flush_interval_s: Seconds = Field(
        default=0.5,
        description="Seconds between writes of a source's changes to the store; more under load.",
    )
    store_poll_interval_s: Seconds = Field(
        default=1.0,
        description="Seconds between looks at what other replicas have written.",
    )
    store_takeover_s: Seconds = Field(
        default=3.0,
        description="Seconds that a source's copy in the store may lag before another replica writes it.",
    )
    store_check_interval_s: Seconds = Field(
        default=60.0,
        description="Seconds between comparisons of each source's records in memory and in the store, and between "
        "looks at the server's own condition.",
    )
    store_pending_max_bytes: Bytes = Field(
        default=64 * MIB,
        description="Most bytes of changes that wait for the store; past it a source is written as a whole later.",
    )

    @model_validator(mode="after")
    def _one_password(self) -> Self:
        """Find out at start, not at the first connection, that a password is there, once."""
        given = {
            "store_password_file": self.store_password_file,
            "store_password": self.store_password,
            "store": self.store.password,
        }
        first, *others = [key for key, value in given.items() if value is not None] or [""]
        if others:
            raise SettingsError(first, HIDDEN, f"one password: there is one in {' and '.join(others)} as well")
        if self.store_password_file is not None:
            password_in(self.store_password_file)
        return self
