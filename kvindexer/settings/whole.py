"""All settings in one frozen object, put together from its groups.

A setting belongs to the group whose file says what it is for; what settings of several groups must agree on is
checked here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Self

from pydantic import BaseModel, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from kvindexer.errors import SettingsError
from kvindexer.hiding import HIDDEN
from kvindexer.settings.access import CLOSED_DOOR, Access, is_loopback
from kvindexer.settings.discovering import Discovering
from kvindexer.settings.holding import Holding
from kvindexer.settings.learning import Learning
from kvindexer.settings.requests import Requests
from kvindexer.settings.serving import Serving
from kvindexer.settings.storing import Storing
from kvindexer.settings.streams import Streams
from kvindexer.settings.texts import Texts
from kvindexer.settings.tokenizer import key_of
from kvindexer.settings.watching import Watching

if TYPE_CHECKING:
    from pydantic_settings import PydanticBaseSettingsSource

GROUPS: Final[tuple[type[BaseModel], ...]] = (
    Serving,
    Requests,
    Access,
    Streams,
    Holding,
    Storing,
    Texts,
    Learning,
    Discovering,
    Watching,
)
"""As docs/settings.md lists them."""


class Settings(
    Serving, Requests, Access, Streams, Holding, Storing, Texts, Learning, Discovering, Watching, BaseSettings
):
    """One frozen object, handed down from `service.run`; the fields of the groups are the documentation."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", validate_default=True, hide_input_in_errors=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take values from the constructor only: `load_settings` stacks the layers, where the order is seen."""
        return (init_settings,)

    @model_validator(mode="after")
    def _the_door_is_closed_or_said_to_be_open(self) -> Self:
        if self.auth is None and not self.closed and not is_loopback(self.host):
            raise SettingsError("auth", None, f"{CLOSED_DOOR} (host is {self.host})")
        return self

    @model_validator(mode="after")
    def _engines_are_allowed(self) -> Self:
        for model, tokenizer in self.tokenizers.items():
            for url in tokenizer.engines:
                if not self.allows(url):
                    expected = f"a match of allowed_endpoints {self.allowed_endpoints}"
                    raise SettingsError(f"{key_of(model)}.engines", url, expected)
        return self

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Keep the salts of deployments out of logs."""
        for name, value in super().__repr_args__():
            hidden = tuple(replace(spec, additional_salt=HIDDEN) for spec in value) if name == "sources" else value
            yield name, hidden
