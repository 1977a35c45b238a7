"""Everything an operator can choose, in one frozen object.

    defaults  <  KVINDEXER_... variables  <  the YAML file of --config  <  flags

A layer replaces a value as a whole; only `tier_weights` and `media` add to what is built in.  Whatever is wrong, in
whichever layer, comes out as one `SettingsError` that names the key, the value and what was expected.  Settings are
built in one place, at start; nothing reads the environment later.

`python -m kvindexer.settings` prints the table of docs/settings.md.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self, get_args

import yaml
from pydantic import BeforeValidator, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from kvindexer.errors import SettingsError
from kvindexer.source_settings import HIDDEN, TIER_NAMES, check_source, parse_source, short, source_of
from kvindexer.store.address import StoreAddress, read_address, without_password
from kvindexer.store.password import password_in
from kvindexer.tiering.feedback import MAX_REMEMBERED
from kvindexer.tokenizer_settings import TokenizerSpec, key_of, read_tokenizers
from kvindexer.types import SourceSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic_settings import PydanticBaseSettingsSource

ENV_PREFIX: Final = "KVINDEXER_"
MIB: Final = 1024 * 1024
MAX_COUNT: Final = 2**31 - 1
"""ZMQ and the operating system take counts and sizes as 32-bit integers in places."""
MAX_SECONDS: Final = 7 * 24 * 3600.0
"""A week: waits are handed to the operating system in 32-bit milliseconds."""
TIER_WEIGHTS: Final = {"gpu": 1.0, "cpu": 0.8, "disk": 0.4, "remote": 0.2}

LogLevel = Literal["debug", "info", "warning", "error", "critical"]


def _no_boolean(value: object) -> object:
    """YAML reads a bare `yes` as true, which must not pass as the number 1."""
    if isinstance(value, bool):
        raise ValueError("a number")  # noqa: TRY004 - pydantic reports ValueError
    return value


def _from_text(value: object) -> object:
    """Variables and --set are text: read lists and maps from it as YAML, of which JSON is a part."""
    if isinstance(value, str):
        try:
            return yaml.safe_load(value)
        except (yaml.YAMLError, RecursionError):
            raise ValueError("a list or map, as YAML or JSON") from None
    return value


Count = Annotated[int, BeforeValidator(_no_boolean), Field(gt=0, le=MAX_COUNT)]
Bytes = Annotated[int, BeforeValidator(_no_boolean), Field(gt=0, le=2**40)]
Seconds = Annotated[float, BeforeValidator(_no_boolean), Field(gt=0, le=MAX_SECONDS, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]*$", max_length=64)]
Weight = Annotated[float, BeforeValidator(_no_boolean), Field(ge=0, le=1e6, allow_inf_nan=False)]


class Settings(BaseSettings):
    """One frozen object, handed down from `service.run`; the fields are the documentation."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, frozen=True, extra="forbid", validate_default=True, hide_input_in_errors=True
    )

    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address to listen on; 0.0.0.0 is every address of the machine.",
    )
    port: Annotated[int, BeforeValidator(_no_boolean)] = Field(
        default=8090,
        ge=0,
        le=65535,
        description="TCP port of the HTTP service; with 0 the operating system chooses one.",
    )
    log_level: LogLevel = Field(default="info", description="The least important messages that are still logged.")
    sources: tuple[SourceSpec, ...] = Field(
        default=(),
        description="Publishers known from the start, each a map with the fields of a source (see below).",
    )

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
    shutdown_grace_s: Seconds = Field(
        default=5.0,
        description="Seconds that open requests get to end at a stop; then they are cut off.",
    )
    drain_s: Annotated[float, BeforeValidator(_no_boolean)] = Field(
        default=3.0,
        ge=0,
        le=MAX_SECONDS,
        allow_inf_nan=False,
        description=(
            "Seconds after SIGTERM in which /ready is 503 and queries are still answered, so that load balancers "
            "turn elsewhere first; 0: none."
        ),
    )

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
    media: Annotated[Mapping[str, str], BeforeValidator(_from_text)] = Field(
        default={},
        description="Further names of media (in any case) and the tier of each, over the built-in table.",
    )
    tier_weights: Annotated[Mapping[str, Weight], BeforeValidator(_from_text)] = Field(
        default=TIER_WEIGHTS,
        description="Worth of a block on each tier against 1.0; a tier that isn't named keeps its own.",
    )

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
    feedback_min_reports: Annotated[int, BeforeValidator(_no_boolean)] = Field(
        default=8,
        gt=0,
        le=MAX_REMEMBERED,
        description="Fewest reports within the window for a verdict on a source.",
    )
    feedback_wrong_share: Annotated[float, BeforeValidator(_no_boolean)] = Field(
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
        default=30_000,
        description="Most blocks of questions counted a second; past it prompts are left out and estimated.",
    )

    tokenizers: Mapping[str, TokenizerSpec] = Field(
        default={},
        description="What makes tokens of texts, by model: a map with `path` or `engines` (see below).",
    )
    tokenizer_api_key: SecretStr | None = Field(
        default=None,
        description="Key that is sent to the engines of `tokenizers` as a bearer token.",
    )
    tokenizer_timeout_s: Seconds = Field(
        default=5.0,
        description="Seconds that a text may wait for its tokens; then the answer is 503.",
    )
    tokenizer_threads: Annotated[int, BeforeValidator(_no_boolean)] = Field(
        default=2,
        gt=0,
        le=256,
        description="Threads of each local tokenizer.",
    )
    tokenizer_connections: Annotated[int, BeforeValidator(_no_boolean)] = Field(
        default=8,
        gt=0,
        le=1024,
        description="Most requests at once to the engines of a model for tokens.",
    )
    tokenizer_answer_max_bytes: Bytes = Field(
        default=64 * MIB,
        description="Longest answer of an engine to a text in bytes; it may hold processed images.",
    )
    tokenizer_cache_bytes: Bytes = Field(
        default=64 * MIB,
        description="Most bytes of tokens kept for texts that come again.",
    )
    tokenizer_cache_ttl_s: Seconds = Field(
        default=300.0,
        description="Seconds that tokens of a text are kept: templates may hold the date, engines may be replaced.",
    )

    allowed_endpoints: Annotated[tuple[str, ...], BeforeValidator(_from_text)] = Field(
        default=("tcp://*", "http://*", "https://*"),
        description="Patterns (* and ?) of which an endpoint must match one to be dialled; an http address is asked "
        "for the publishers that the engine lists, or for tokens.",
    )
    bind_endpoints: Annotated[tuple[str, ...], BeforeValidator(_from_text)] = Field(
        default=(),
        description="Endpoints to listen on for engines that dial in; their sources are told apart by topic and "
        "rank, which any peer can claim.",
    )
    max_message_bytes: Bytes = Field(
        default=64 * MIB,
        description="Largest message of a publisher in bytes; a larger one is dropped and counted.",
    )
    receive_hwm: Count = Field(
        default=32,
        description="Most messages that wait in a source's socket; past it they wait at the publisher, which drops "
        "what is beyond its own limit (seen as a gap).",
    )
    held_max_frames: Count = Field(
        default=10_000,
        description="Most messages of a source held behind a gap or a replay; past it the gap stays open.",
    )
    held_max_bytes: Bytes = Field(
        default=64 * MIB,
        description="Most bytes of a source held behind a gap or a replay; past it the gap stays open.",
    )
    replay_timeout_s: Seconds = Field(
        default=5.0,
        description="Seconds without a frame after which a replay counts as failed and is tried again later.",
    )
    replay_max_bytes: Bytes = Field(
        default=512 * MIB,
        description="Most bytes taken from one replay; past it the replay counts as failed.",
    )
    replay_retry_min_s: Seconds = Field(
        default=0.5,
        description="Seconds before the first new try of a failed replay; doubled with every further one.",
    )
    replay_retry_max_s: Seconds = Field(
        default=30.0,
        description="Seconds between tries of a failing replay, at most.",
    )
    max_concurrent_replays: Count = Field(
        default=8,
        description="Most replays under way at once; further ones wait for their turn.",
    )
    sync_deadline_s: Seconds = Field(
        default=20.0,
        description="Seconds that a source known at start may hold up /ready.",
    )
    probe_interval_s: Seconds = Field(
        default=5.0,
        description="Seconds of silence after which a source's replay socket is asked whether all is well.",
    )
    stale_after_s: Seconds = Field(
        default=15.0,
        description="Seconds without a sign of life after which a source is shown as stale.",
    )
    gone_after_s: Seconds = Field(
        default=300.0,
        description="Seconds without a sign of life after which a source leaves the answers.",
    )
    slice_ms: Annotated[float, BeforeValidator(_no_boolean)] = Field(
        default=2.0,
        gt=0,
        le=1000,
        allow_inf_nan=False,
        description="Longest stretch of ingest in milliseconds before waiting queries get their turn.",
    )

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
        description="Seconds between comparisons of each source's digest in memory and in the store, and between "
        "looks at the server's own condition.",
    )
    store_pending_max_bytes: Bytes = Field(
        default=64 * MIB,
        description="Most bytes of changes that wait for the store; past it a source is written as a whole later.",
    )
    replica: Name = Field(
        default="",
        description="Name of this replica, different from all others; without one, the host's name and a random "
        "suffix.",
    )

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

    @field_validator("log_level", mode="before")
    @classmethod
    def _any_case(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @field_validator("sources", mode="before")
    @classmethod
    def _read_sources(cls, value: object) -> object:
        listed = _from_text(value)
        if not isinstance(listed, list | tuple):
            raise ValueError("a list of sources")  # noqa: TRY004 - pydantic reports ValueError
        return tuple(_source(item, f"sources[{place}]") for place, item in enumerate(listed))

    @field_validator("tokenizers", mode="before")
    @classmethod
    def _read_tokenizers(cls, value: object) -> object:
        return read_tokenizers(_from_text(value))

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
                raise SettingsError(f"tier_weights.{tier}", value[tier], f"a tier: {', '.join(TIER_NAMES)}")
        return {**TIER_WEIGHTS, **value}

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        for smaller, larger in (
            ("replay_retry_min_s", "replay_retry_max_s"),
            ("probe_interval_s", "stale_after_s"),
            ("stale_after_s", "gone_after_s"),
        ):
            if getattr(self, smaller) > getattr(self, larger):
                value = getattr(self, larger)
                raise SettingsError(larger, value, f"at least {smaller}, which is {getattr(self, smaller)}")
        self._one_password()
        for model, tokenizer in self.tokenizers.items():
            for url in tokenizer.engines:
                if not self.allows(url):
                    expected = f"a match of allowed_endpoints {self.allowed_endpoints}"
                    raise SettingsError(f"{key_of(model)}.engines", url, expected)
        dialled: dict[str, SourceSpec] = {}
        for place, spec in enumerate(self.sources):
            key = f"sources[{place}].endpoint"
            if spec.endpoint in self.bind_endpoints:
                continue
            if not self.allows(spec.endpoint):
                raise SettingsError(key, spec.endpoint, f"a match of allowed_endpoints {self.allowed_endpoints}")
            if dialled.setdefault(spec.endpoint, spec) != spec:
                raise SettingsError(key, spec.endpoint, "one source an endpoint")
        return self

    def _one_password(self) -> None:
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

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Keep the salts of deployments out of logs."""
        for name, value in super().__repr_args__():
            hidden = tuple(replace(spec, additional_salt=HIDDEN) for spec in value) if name == "sources" else value
            yield name, hidden

    def allows(self, endpoint: str) -> bool:
        """Whether the operator lets us dial this endpoint."""
        return any(fnmatchcase(endpoint, pattern) for pattern in self.allowed_endpoints)


def load_settings(config: Path | None, overrides: Mapping[str, Any], environ: Mapping[str, str]) -> Settings:
    """Stack the layers.  Raises nothing but SettingsError."""
    layers = (_environment(environ), _yaml_file(config) if config else {}, overrides)
    values: dict[str, Any] = {}
    for layer in layers:
        values.update(layer)
    for key, value in values.items():
        if key not in Settings.model_fields:
            raise SettingsError(str(key), short(value), _known_settings(str(key)))
    try:
        return Settings(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name, *inside = first["loc"]
        key = str(name) + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in inside)
        expected = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        raise SettingsError(key, _shown(str(name), first["input"]), expected) from None


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables with our prefix; those that Kubernetes sets for a service named kvindexer aren't meant for us."""
    return {
        name.removeprefix(ENV_PREFIX).lower(): value
        for name, value in environ.items()
        if name.startswith(ENV_PREFIX) and not _is_service_link(name, value)
    }


_LINK_NAME = re.compile(r"_SERVICE_(HOST|PORT(_\w+)?)$|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$")
_LINK_VALUE = re.compile(r"(tcp|udp|sctp)://")


def _is_service_link(name: str, value: str) -> bool:
    """KVINDEXER_SERVICE_HOST, KVINDEXER_PORT=tcp://10.0.0.1:8090, KVINDEXER_PORT_8090_TCP and their like."""
    return bool(_LINK_NAME.search(name)) or (name.endswith("_PORT") and bool(_LINK_VALUE.match(value)))


class _UniqueKeys(yaml.SafeLoader):
    """YAML lets the last of two equal keys win without a word; here it is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen if isinstance(key, yaml.ScalarNode) else False:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands there twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _yaml_file(config: Path) -> dict[str, Any]:
    shown = str(config)
    try:
        with config.open("rb") as file:
            content = yaml.load(file, Loader=_UniqueKeys)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise SettingsError("config", shown, f"a readable file ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = getattr(error, "problem", None) or "it can't be read"
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise SettingsError("config", shown, f"YAML ({problem}{place})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError("config", shown, "a YAML map of settings")
    return content


def _source(item: object, key: str) -> SourceSpec:
    match item:
        case SourceSpec():
            check_source(item, key)
            return item
        case dict():
            return source_of(item, key)
        case str():
            return parse_source(item, key)
    raise SettingsError(key, short(item), "a map with the fields of a source")


def _known_settings(key: str) -> str:
    near = difflib.get_close_matches(key, Settings.model_fields, n=1)
    return f"a known setting; did you mean {near[0]}?" if near else "a known setting (docs/settings.md lists them)"


def _shown(name: str, value: object) -> object:
    """Hide secrets and cut what would flood a terminal."""
    field = Settings.model_fields.get(name)
    secret = field is not None and SecretStr in (field.annotation, *get_args(field.annotation))
    if name == "store":
        return without_password(str(value))
    return HIDDEN if secret else short(value)


def markdown_table() -> str:
    """All settings as docs/settings.md shows them."""
    lines = ["| setting | variable | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = field.default
        if default in ((), {}, "", None):
            shown = "none"
        elif isinstance(default, dict):
            shown = ", ".join(f"{key} {value}" for key, value in default.items())
        elif isinstance(default, tuple):
            shown = ", ".join(f"`{value}`" for value in default)
        elif isinstance(default, int) and default >= MIB and default % MIB == 0 and name.endswith("_bytes"):
            shown = f"{default} ({default // MIB} MiB)"
        else:
            shown = str(default)
        lines.append(f"| `{name}` | `{ENV_PREFIX}{name.upper()}` | {shown} | {field.description} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown_table())  # noqa: T201 - this is what the module prints when run
