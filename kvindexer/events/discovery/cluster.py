"""The API server, by way of lightkube: the only module that knows a client library.

lightkube reads kubeconfigs and service accounts (and the token file again when its token has run out), builds
requests, turns pages, decodes.  Three things are done here, in the transport under it: a watch asks for bookmarks;
the end of a watch is told, where lightkube would begin the next one at once, however often; and a connection whose
other end is gone without a word is noticed (TCP keepalive).

Environment variables (proxies, certificates) have no say.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final, Generic, cast

import httpx2
import msgspec
from lightkube import ApiError, AsyncClient, KubeConfig, operators
from lightkube.config.client_adapter import verify_cluster
from lightkube.config.kubeconfig import SERVICE_ACCOUNT, SingleConfig
from lightkube.config.models import User
from lightkube.core.exceptions import ConfigError
from lightkube.core.resource import ApiInfo, NamespacedResourceG, ResourceDef

from kvindexer.errors import SettingsError
from kvindexer.events.discovery.collection import ClusterError, Event, Listed, Object, Reason
from kvindexer.events.discovery.pods import Metadata, Pod
from kvindexer.events.discovery.selectors import Requirement
from kvindexer.settings.discovering import Discovering

_log = logging.getLogger(__name__)


class _EndedError(httpx2.TransportError):
    """A watch is over, in good order."""


PAGE: Final = 250
"""Objects that are asked for at once: decoding a page must not keep queries waiting for long."""
_KEEPALIVE: Final = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *(
        (socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
        if hasattr(socket, name)
    ),
)
_MESSAGE_MAX: Final = 300
_LISTED: Final = ["list", "watch", "global_list", "global_watch"]
_STATUS: Final[dict[int, Reason]] = {
    400: "bad_request", 401: "unauthorized", 403: "forbidden", 404: "not_found", 410: "expired", 429: "server_error",
}  # fmt: skip
_SERVER_ERROR: Final = 500
_KINDS: Final[tuple[tuple[tuple[type[Exception], ...], Reason], ...]] = (
    ((_EndedError,), "ended"),
    ((TimeoutError, httpx2.TimeoutException), "timeout"),
    ((httpx2.ConnectError,), "unreachable"),
    ((httpx2.TransportError,), "cut"),
    ((ConfigError, OSError), "credentials"),
)
"""What an error of the library means; the first one that fits."""
_HINTS: Final[dict[Reason, str]] = {
    "unauthorized": "the service account's token was not taken; is it one of this cluster?",
    "forbidden": "the service account needs get, list and watch (docs/discovery.md#rights)",
    "not_found": "does it exist in this cluster, in this namespace?",
    "unreachable": "what is found stays as it is; is there a way to the API server (network policies)?",
    "timeout": "what is found stays as it is; discovery_timeout_s is how long an answer may take",
    "tls": "the certificate of the API server is not one of the cluster's authority",
    "credentials": "is the service account's token mounted (automountServiceAccountToken)?",
}


class PoolObject(msgspec.Struct):
    """An InferencePool, or a bookmark in the place of one."""

    metadata: Metadata = msgspec.field(default_factory=Metadata)
    spec: Any = None


class _Pods(NamespacedResourceG, Pod):
    _api_info = ApiInfo(ResourceDef("", "v1", "Pod"), "pods", _LISTED)


class _Pools(NamespacedResourceG, PoolObject):
    _api_info = ApiInfo(ResourceDef("inference.networking.k8s.io", "v1", "InferencePool"), "inferencepools", _LISTED)


class _OldPools(NamespacedResourceG, PoolObject):
    _api_info = ApiInfo(
        ResourceDef("inference.networking.x-k8s.io", "v1alpha2", "InferencePool"), "inferencepools", _LISTED
    )


POOLS: Final = (_Pools, _OldPools)
"""The kinds of InferencePools, the newer one first."""


class _UntilEnd(httpx2.AsyncByteStream):
    """The stream of a watch, whose end is an error: lightkube would begin anew, without a pause."""

    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._stream:
            yield chunk
        raise _EndedError("the watch has ended")

    async def aclose(self) -> None:
        await self._stream.aclose()


class _Transport(httpx2.AsyncHTTPTransport):
    """See the module's head."""

    answer_s = 10.0

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if request.url.params.get("watch") != "true":
            return await super().handle_async_request(request)
        request.url = request.url.copy_set_param("allowWatchBookmarks", "true")
        try:
            async with asyncio.timeout(self.answer_s):
                response = await super().handle_async_request(request)
        except TimeoutError:
            raise httpx2.ReadTimeout("no answer to a watch", request=request) from None
        if response.status_code == httpx2.codes.OK and isinstance(response.stream, httpx2.AsyncByteStream):
            response.stream = _UntilEnd(response.stream)
        return response


class Cluster:
    """A way to one API server."""

    def __init__(self, config: SingleConfig, rules: Discovering) -> None:
        self.namespace = config.namespace
        self._rules = rules
        user = config.user or User()
        context = verify_cluster(config.cluster, user, config.abs_file, trust_env=False)
        transport = _Transport(verify=context, trust_env=False, socket_options=_KEEPALIVE)
        transport.answer_s = rules.discovery_timeout_s
        self._client = AsyncClient(
            config._replace(user=user),
            timeout=httpx2.Timeout(rules.discovery_timeout_s),
            trust_env=False,
            transport=transport,
        )

    def pods(self, namespace: str, selector: Sequence[Requirement]) -> Objects[Pod]:
        """The pods of a namespace that have these labels."""
        labels = [(one.key, _operator(one)) for one in selector]
        return Objects(self._client, _Pods, namespace, self._rules, labels=labels)

    def pools(self, namespace: str, name: str) -> list[Objects[PoolObject]]:
        """The InferencePool of a name, of each kind that there may be."""
        fields = {"metadata.name": name}
        return [Objects(self._client, kind, namespace, self._rules, fields=fields) for kind in POOLS]

    async def close(self) -> None:
        """Hang up."""
        with contextlib.suppress(httpx2.HTTPError):
            await self._client.close()


class Objects(Generic[Object]):
    """One list of the API server; see `Collection`."""

    def __init__(
        self,
        client: AsyncClient,
        kind: Any,
        namespace: str,
        rules: Discovering,
        *,
        labels: Any = None,
        fields: Any = None,
    ) -> None:
        self._client = client
        self._kind = kind
        self._choice = {"namespace": namespace, "labels": labels, "fields": fields}
        self._rules = rules

    async def list(self) -> Listed[Object]:
        """See `Collection.list`."""
        try:
            async with asyncio.timeout(self._rules.discovery_timeout_s):
                pages = self._client.list(self._kind, chunk_size=PAGE, **self._choice)
                objects = [one async for one in pages]
                return Listed(cast("list[Object]", objects), pages.resourceVersion)
        except Exception as error:
            raise _told(error) from error

    async def watch(self, version: str) -> AsyncIterator[Event[Object]]:
        """See `Collection.watch`."""
        longest_s = self._rules.discovery_watch_s
        events: Any = self._client.watch(
            self._kind, server_timeout=max(1, round(longest_s)), resource_version=version, **self._choice
        )
        try:
            async with contextlib.aclosing(events):
                deadline = asyncio.get_running_loop().time() + longest_s + self._rules.discovery_timeout_s
                while True:
                    async with asyncio.timeout_at(deadline):
                        kind, one = await anext(events)
                    yield Event(kind, cast("Object", one))
        except (TimeoutError, StopAsyncIteration):
            raise ClusterError("ended", "the server did not end the watch in time") from None
        except Exception as error:
            raise _told(error) from error


def _operator(one: Requirement) -> operators.Operator[Any]:
    match one.operator:
        case "=":
            return operators.equal(one.values[0])
        case "!=":
            return operators.not_equal(one.values[0])
        case "in":
            return operators.in_(one.values)
        case "notin":
            return operators.not_in(one.values)
        case "exists":
            return operators.exists()
        case "!":
            return operators.not_exists()


def _told(error: Exception) -> ClusterError:
    """An error of the library, in our words."""
    if isinstance(error, httpx2.HTTPStatusError):
        return _refusal(error)
    shown = str(error) or type(error).__name__
    for kinds, reason in _KINDS:
        if isinstance(error, kinds):
            return _error("tls" if reason == "unreachable" and "CERTIFICATE" in shown else reason, shown)
    _log.debug("an answer of the API server can't be used", exc_info=error)
    return _error("unreadable", f"{type(error).__name__}: {error}")


def _refusal(error: httpx2.HTTPStatusError) -> ClusterError:
    """What an answer with a status, or an ERROR in a watch, says."""
    status = error.status if isinstance(error, ApiError) else None
    response: httpx2.Response | None = error.response
    code = response.status_code if response is not None else (status.code if status is not None else None) or 0
    reason = _STATUS.get(code, "server_error" if code >= _SERVER_ERROR else "refused")
    message = (status.message if status is not None else None) or f"status {code}"
    return _error(reason, f"{code}: {message}")


def _error(reason: Reason, message: str) -> ClusterError:
    shown = message if len(message) <= _MESSAGE_MAX else f"{message[:_MESSAGE_MAX]}..."
    return ClusterError(reason, shown, _HINTS.get(reason, ""))


def open_cluster(rules: Discovering, account: Path = Path(SERVICE_ACCOUNT)) -> Cluster:
    """Raise SettingsError if there is no usable way to an API server."""
    path = rules.discovery_kubeconfig
    try:
        config = KubeConfig.from_file(path) if path else KubeConfig.from_service_account(str(account))
        chosen = config.get()
        return Cluster(cast("SingleConfig", chosen), rules)  # never None without a default
    except KeyError as error:
        if path:
            raise SettingsError("discovery_kubeconfig", path, f"a kubeconfig ({error} is missing)") from None
        raise SettingsError("discovery", "kubernetes", _NO_ACCOUNT) from None
    except Exception as error:  # noqa: BLE001 - whatever a kubeconfig does to a library is a slip in it
        if path:
            raise SettingsError("discovery_kubeconfig", path, f"a kubeconfig ({error})") from None
        raise SettingsError("discovery", "kubernetes", f"{_NO_ACCOUNT} ({error})") from None


_NO_ACCOUNT: Final = "a pod with a mounted service-account token, or discovery_kubeconfig outside of a cluster"
