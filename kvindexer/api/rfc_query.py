"""POST /query and /query_by_hash of RFC #1403, in the forms that Mooncake and Dynamo answer in.

`model` asks for Mooncake's form, `model_name` for Dynamo's.  Both list only instances that hold something.  Each
figure of an instance is that of the rank which is best in it, as both do it.  The RFC knows three tiers: what we call
remote is part of its DISK, which covers network file systems.

                longest_matched   GPU / gpu       CPU / cpu       DISK / disk        DP / dp
    Mooncake    all tiers         alone           alone           alone, + remote    a rank's longest_matched
    Dynamo      all tiers         gpu             gpu, cpu        all tiers          a rank's gpu
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from kvindexer.access.identity import salt_of
from kvindexer.api.decoding import check_size, reader, unsigned
from kvindexer.api.lookup import Found, KnownModels, find, keyspaces, one_size, tenant_named
from kvindexer.api.metrics import Metrics
from kvindexer.api.prompt import KeyPrompt, Prompt, TokenPrompt, packed_tokens
from kvindexer.api.rfc_schemas import (
    DynamoAnswer,
    DynamoFigures,
    HashQuery,
    MooncakeFigures,
    Scope,
    TokenQuery,
    one_of,
)
from kvindexer.errors import RequestError, TooLargeError
from kvindexer.index.seam import HolderMatch, Index
from kvindexer.settings import Settings
from kvindexer.tiering.heat import HeatCounts
from kvindexer.tokenization.blocks import keys_from_locals
from kvindexer.types import Keyspace

_encode = msgspec.json.Encoder().encode
_read_tokens = reader(TokenQuery)
_read_hashes = reader(HashQuery)


class QueryRoutes:
    """Both routes, as functions of the body."""

    def __init__(
        self,
        settings: Settings,
        index: Index,
        models: KnownModels,
        metrics: Metrics,
        *,
        heat: HeatCounts | None = None,
    ) -> None:
        self._index = index
        self._heat = heat
        self._models = models
        self._metrics = metrics
        self._max_prompt_tokens = settings.max_prompt_tokens

    def by_tokens(self, body: bytes) -> bytes:
        """POST /query.  Raises RequestError."""
        check_size(body, self._max_prompt_tokens)
        query = _read_tokens(body)
        spaces = self._keyspaces(query)
        packed = packed_tokens(query.token_ids, self._max_prompt_tokens)
        return self._answer(
            query, spaces, TokenPrompt(packed, lora=query.lora_name, cache_salt=salt_of(query.cache_salt))
        )

    def by_hash(self, body: bytes) -> bytes:
        """POST /query_by_hash.  Raises RequestError."""
        check_size(body, self._max_prompt_tokens)
        query = _read_hashes(body)
        if query.cache_salt or query.lora_name:
            raise RequestError(
                "extras_with_hashes",
                "hashes already depend on cache salt and LoRA",
                "make the hashes with cache_salt and lora_name and leave both away here, or use /query",
            )
        spaces = self._keyspaces(query)
        return self._answer(query, spaces, self._hash_prompt(query, one_size(spaces, "hashes")))

    def _hash_prompt(self, query: HashQuery, block_size: int) -> KeyPrompt:
        given = [
            (name, hashes)
            for name in ("seq_hashes", "block_hash", "block_hashes")
            if (hashes := getattr(query, name)) is not None
        ]
        if len(given) != 1:
            raise RequestError(
                "invalid_request",
                "the hashes are missing or given twice",
                "give exactly one of seq_hashes (or block_hash), which are rolling, and block_hashes, which are not",
                status=422,
            )
        name, hashes = given[0]
        if len(hashes) * block_size > self._max_prompt_tokens:
            raise TooLargeError(
                "prompt in tokens", len(hashes) * block_size, self._max_prompt_tokens, "max_prompt_tokens"
            )
        return KeyPrompt(_chained(hashes, name) if name == "block_hashes" else unsigned(hashes, name))

    def _keyspaces(self, query: Scope) -> list[Keyspace]:
        if query.lora_id and query.lora_id > 0 and not query.lora_name:
            raise RequestError(
                "lora_id_unsupported", "an adapter's number says nothing outside its engine", "give lora_name"
            )
        model = one_of(query, "model", "modelname", "model_name")
        if model is None:
            raise RequestError("invalid_request", "there is no model", "give model or model_name", status=422)
        return keyspaces(
            self._index,
            self._models,
            tenant_named(one_of(query, "tenant_id", "routing_group")),
            model,
            additional_salt=one_of(query, "additionalsalt", "additional_salt"),
            block_size=query.block_size,
        )

    def _answer(self, query: Scope, spaces: list[Keyspace], prompt: Prompt) -> bytes:
        wanted = None if query.instance_id is None else frozenset((str(query.instance_id),))
        found = find(self._index, spaces, prompt, wanted)
        if self._heat is not None:
            for space in spaces:
                self._heat.asked(space, prompt.keys(space.block_size))
        hit = max((match.usable * space.block_size for space, matches in found for match in matches), default=0)
        self._metrics.asked(hit, prompt.tokens(spaces[0].block_size))
        if query.model is None and query.modelname is None:
            return _encode(_dynamo(found))
        return _encode({tenant_named(one_of(query, "tenant_id", "routing_group")): _mooncake(found)})


def _chained(hashes: list[int], name: str) -> list[int]:
    try:
        return keys_from_locals(hashes)
    except OverflowError:  # a mixture of signed and unsigned ones, or too large
        return keys_from_locals(unsigned(hashes, name))


def _mooncake(found: Iterable[Found]) -> dict[str, MooncakeFigures]:
    answer: dict[str, MooncakeFigures] = {}
    for space, matches in found:
        size = space.block_size
        for match in matches:
            if not match.usable:
                continue
            gpu, cpu, disk, remote = _within(match, match.alone)
            longest, rank = match.usable * size, str(match.rank)
            figures = answer.get(match.instance)
            if figures is None:
                answer[match.instance] = MooncakeFigures(
                    longest, gpu * size, cpu * size, max(disk, remote) * size, {rank: longest}
                )
                continue
            figures.longest_matched = max(figures.longest_matched, longest)
            figures.gpu = max(figures.gpu, gpu * size)
            figures.cpu = max(figures.cpu, cpu * size)
            figures.disk = max(figures.disk, disk * size, remote * size)
            figures.dp[rank] = max(figures.dp.get(rank, 0), longest)
    return answer


def _dynamo(found: Iterable[Found]) -> DynamoAnswer:
    answer = DynamoAnswer({}, [], {})
    instances, scores = answer.instances, answer.scores
    for space, matches in found:
        size = space.block_size
        for match in matches:
            if not match.usable:
                continue
            instance, rank = match.instance, str(match.rank)
            gpu, cpu, _, remote = match.cumulative if match.usable == match.held else _within(match, match.cumulative)
            gpu *= size
            figures = instances.get(instance)
            if figures is None:
                instances[instance] = DynamoFigures(match.usable * size, gpu, {rank: gpu}, cpu * size, remote * size)
                if gpu:
                    scores[instance] = {rank: gpu}
                continue
            figures.longest_matched = max(figures.longest_matched, match.usable * size)
            figures.gpu = max(figures.gpu, gpu)
            figures.cpu = max(figures.cpu, cpu * size)
            figures.disk = max(figures.disk, remote * size)
            figures.dp[rank] = max(figures.dp.get(rank, 0), gpu)
            if gpu:
                scores.setdefault(instance, {})[rank] = figures.dp[rank]
    return answer


def _within(match: HolderMatch, depths: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Depths by tier, none beyond what the rules of the cache groups let the engine use."""
    usable = match.usable
    if usable == match.held:
        return depths
    gpu, cpu, disk, remote = (min(depth, usable) for depth in depths)
    return gpu, cpu, disk, remote
