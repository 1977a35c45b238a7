"""Who may come in, and what travels in clear.

Off by default on loopback, and nowhere else: what can be reached from other machines needs a way to tell callers
apart, or the words `auth: none`.
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, field_validator, model_validator

from kvindexer.access.identity import Grant
from kvindexer.errors import SettingsError
from kvindexer.settings.granting import grants_of
from kvindexer.settings.tokenizer import is_http
from kvindexer.settings.values import Count, Seconds, from_text, no_boolean

CLOSED_DOOR: Final = (
    "a way to tell callers apart where other machines can reach the service: one of auth_tokens_file, "
    "auth_kubernetes_audience and auth_certificates; or `auth: none` if everybody who reaches it may do everything; "
    "or host 127.0.0.1"
)
_SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")

Grants = Annotated[Mapping[str, Grant], BeforeValidator(from_text)]


class Access(BaseModel):
    """Access."""

    auth: Literal["none", "required"] | None = Field(
        default=None,
        description="`required`: callers must say who they are, in one of the ways below; `none`: everybody may do "
        "everything.  Unset: required as soon as one of the ways is configured, else none on loopback, and elsewhere "
        "an error at start.",
    )
    auth_tokens_file: Path | None = Field(
        default=None,
        description="YAML file of bearer tokens and their roles (docs/security.md); read again when it changes.",
    )
    auth_kubernetes_audience: str = Field(
        default="",
        max_length=1024,
        description="Accept bearer tokens that the Kubernetes API server confirms for this audience (TokenReview).",
    )
    auth_kubernetes_roles: Grants = Field(
        default={},
        description="Roles by user or group of Kubernetes: a list, or a map of `roles`, `tenant`, `cache_salt`.",
    )
    auth_kubernetes_api: str = Field(
        default="",
        description="Address of the API server; without one, the one that Kubernetes tells its pods.",
    )
    auth_kubernetes_token_file: Path = Field(
        default=_SERVICE_ACCOUNT / "token",
        description="Our own token for the API server; read again when it changes.",
    )
    auth_kubernetes_ca_file: Path = Field(
        default=_SERVICE_ACCOUNT / "ca.crt",
        description="Certificates that the API server's is checked with; read again when they change.",
    )
    auth_kubernetes_timeout_s: Seconds = Field(
        default=3.0,
        description="Seconds that the API server may take to confirm a token; then the answer is 503.",
    )
    auth_kubernetes_cache_s: Seconds = Field(
        default=60.0,
        description="Seconds for which a confirmed token needs no new confirmation.",
    )
    auth_kubernetes_cache_tokens: Count = Field(
        default=4096,
        description="Most tokens whose confirmation, or refusal, is remembered; then the oldest go.",
    )
    auth_certificates: Grants = Field(
        default={},
        description="Roles by a name in the client's certificate (DNS, URI or common name; `*`: any certificate): a "
        "list, or a map of `roles`, `tenant`, `cache_salt`.  Needs tls_client_ca_file.",
    )
    auth_tenant_endpoints: Annotated[Mapping[str, tuple[str, ...]], BeforeValidator(from_text)] = Field(
        default={},
        description="Patterns of endpoints by tenant: a caller that is bound to one of these tenants may register no "
        "others.",
    )
    max_requests_per_s: Annotated[float, BeforeValidator(no_boolean)] | None = Field(
        default=None,
        gt=0,
        le=1e9,
        allow_inf_nan=False,
        description="Most requests a second of one caller, or of one address if callers have no names; more are "
        "answered with 429.  Without a number max_concurrent_requests is the only limit.",
    )
    max_callers: Count = Field(
        default=10_000,
        description="Most callers whose rates are watched at once; then those go that have been quiet longest.",
    )
    max_connections: Count = Field(
        default=4096,
        description="Most HTTP connections at once; one more is answered with 503 and closed.",
    )
    send_timeout_s: Seconds = Field(
        default=30.0,
        description="Seconds for which a client may take nothing of an answer; then its connection is closed.",
    )
    tls_cert_file: Path | None = Field(
        default=None,
        description="Our certificate and those between it and its authority, as PEM; makes the service speak HTTPS.  "
        "This file, the key and the client authorities are read again when they change.",
    )
    tls_key_file: Path | None = Field(
        default=None,
        description="The private key of tls_cert_file, as PEM, without a password.",
    )
    tls_client_ca_file: Path | None = Field(
        default=None,
        description="Authorities whose client certificates are accepted, as PEM.  Every client needs one, unless "
        "auth_certificates is but one of several ways in.",
    )
    probe_host: str = Field(
        default="",
        description="Address of the listener of probe_port; without one, that of host.",
    )
    probe_port: Annotated[int, BeforeValidator(no_boolean)] | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="A second port that has /health, /ready and /metrics only, over plain HTTP and for everybody; "
        "with 0 the operating system chooses one.",
    )
    curve_secret_key_file: Path | None = Field(
        default=None,
        description="Our own CURVE key pair, a file as zmq.auth.create_certificates writes it; without one, sources "
        "with a curve_server_key are dialled with a pair made at start.",
    )

    @field_validator("auth_kubernetes_roles", "auth_certificates", mode="before")
    @classmethod
    def _read_grants(cls, value: object, info: object) -> object:
        return grants_of(from_text(value), str(getattr(info, "field_name", "")))

    @field_validator("auth_kubernetes_api")
    @classmethod
    def _an_address(cls, value: str) -> str:
        if value and not is_http(value):
            raise SettingsError("auth_kubernetes_api", value, "an address as https://host:port")
        return value

    @model_validator(mode="after")
    def _parts_belong_together(self) -> Self:
        needs: tuple[tuple[str, object, str, object], ...] = (
            ("tls_cert_file", self.tls_cert_file, "tls_key_file", self.tls_key_file),
            ("tls_key_file", self.tls_key_file, "tls_cert_file", self.tls_cert_file),
            ("tls_client_ca_file", self.tls_client_ca_file, "tls_cert_file", self.tls_cert_file),
            ("auth_certificates", self.auth_certificates, "tls_client_ca_file", self.tls_client_ca_file),
            (
                "auth_kubernetes_roles",
                self.auth_kubernetes_roles,
                "auth_kubernetes_audience",
                self.auth_kubernetes_audience,
            ),
            (
                "auth_kubernetes_audience",
                self.auth_kubernetes_audience,
                "auth_kubernetes_roles",
                self.auth_kubernetes_roles,
            ),
            ("probe_host", self.probe_host, "probe_port", self.probe_port is not None),
        )
        for key, given, other, there in needs:
            if given and not there:
                raise SettingsError(other, None, f"a value: {key} is set and says nothing without it")
        if self.auth == "none" and self.ways_in:
            raise SettingsError(
                "auth", self.auth, f"required, or no {self.ways_in[0]}: with none nobody is asked who he is"
            )
        if self.auth == "required" and not self.ways_in:
            raise SettingsError(
                "auth", self.auth, "one of auth_tokens_file, auth_kubernetes_audience and auth_certificates beside it"
            )
        return self

    @property
    def ways_in(self) -> tuple[str, ...]:
        """The settings by which callers can say who they are."""
        ways = ("auth_tokens_file", "auth_kubernetes_audience", "auth_certificates")
        return tuple(way for way in ways if getattr(self, way))

    @property
    def closed(self) -> bool:
        """Whether callers must say who they are."""
        return bool(self.ways_in)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    try:
        return ip_address(host.strip("[]").partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"
