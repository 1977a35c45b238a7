"""POST /v1/match: how long a prefix of a prompt does each instance hold, and how sure is that.

body ─► MatchRequest ─► keyspaces, prompt ─► Index.match in each ─► rows, best first ─► MatchAnswer
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from kvindexer.api.decoding import check_size, reader, unsigned
from kvindexer.api.fleet import Fleet
from kvindexer.api.lookup import DEFAULT_TENANT, Found, KnownModels, find, keyspaces, one_size
from kvindexer.api.metrics import Metrics
from kvindexer.api.prompt import KeyPrompt, Prompt, TokenPrompt, decoded_tokens, packed_tokens
from kvindexer.api.rows import best_first, empty_rows, requirements
from kvindexer.api.schemas import MatchAnswer, MatchRequest
from kvindexer.errors import RequestError, TooLargeError
from kvindexer.index.seam import Index
from kvindexer.settings import Settings
from kvindexer.tokenization.blocks import TOKEN_BYTES
from kvindexer.tokenization.extras import MultimodalItem
from kvindexer.types import Keyspace

MAX_OVERLAP: Final = 8
"""How many multimodal items may share a token, on average (audio and video of one clip do)."""

_encode = msgspec.json.Encoder().encode
_read = reader(MatchRequest)


class MatchRoute:
    """The route, as a function of the body."""

    def __init__(self, settings: Settings, index: Index, fleet: Fleet, models: KnownModels, metrics: Metrics) -> None:
        self._index = index
        self._fleet = fleet
        self._models = models
        self._metrics = metrics
        self._max_prompt_tokens = settings.max_prompt_tokens
        self._max_candidates = settings.max_candidates

    def __call__(self, body: bytes) -> bytes:
        """Answer one request.  Raises RequestError."""
        check_size(body, self._max_prompt_tokens, self._max_candidates)
        request = _read(body)
        required = requirements(request.require)
        spaces = keyspaces(
            self._index,
            self._models,
            request.tenant or DEFAULT_TENANT,
            request.model,
            additional_salt=request.additional_salt,
            block_size=request.block_size,
        )
        known = self._known(request.candidates, spaces)
        prompt = self._prompt(request, spaces)
        found = find(self._index, spaces, prompt, known)
        rows = best_first(found, self._fleet, required)
        best = max((row.matched_tokens for row in rows), default=0)
        unknown: list[str] = []
        if known is not None:
            holding = {match.instance for each in found for match in each.matches if match.usable}
            rows += empty_rows(
                {name: size for name, size in known.items() if name not in holding}, self._fleet, required
            )
            unknown = [name for name in dict.fromkeys(request.candidates or ()) if name not in known]
        size = min(space.block_size for space in spaces)
        tokens = prompt.tokens(size)
        answer = MatchAnswer(request.model, tokens // size, tokens, rows, unknown)
        if not best:
            answer.reason = self._reason(spaces, known, found, blocks=answer.blocks)
        self._metrics.asked(best, tokens)
        return _encode(answer)

    def _known(self, candidates: list[str] | None, spaces: list[Keyspace]) -> dict[str, int] | None:
        """Block size of each candidate that a match could name; None: there is no choice of candidates."""
        if candidates is None:
            return None
        if len(candidates) > self._max_candidates:
            raise TooLargeError("candidates", len(candidates), self._max_candidates, "max_candidates")
        named = set(candidates)
        return {
            instance: space.block_size
            for space in spaces
            for instance in self._index.instances(space)
            if instance in named
        }

    def _reason(
        self, spaces: list[Keyspace], known: Mapping[str, int] | None, found: list[Found], *, blocks: int
    ) -> str:
        """Why no instance has any of the prompt."""
        if not any(self._index.instances(space) for space in spaces):
            return "no_instance"
        if known is not None and not known:
            return "no_known_candidate"
        if not blocks:
            return "shorter_than_a_block"
        if any(match.usable for each in found for match in each.matches):
            return "filtered_by_require"
        return "nothing_held"

    def _prompt(self, request: MatchRequest, spaces: list[Keyspace]) -> Prompt:
        if sum(given is not None for given in (request.tokens, request.tokens_b64, request.keys)) != 1:
            raise RequestError(
                "invalid_request",
                "the prompt is missing or given twice",
                "give exactly one of tokens, tokens_b64 and keys",
                status=422,
            )
        if request.keys is not None:
            return self._key_prompt(request, request.keys, one_size(spaces, "keys"))
        if request.prompt_tokens is not None:
            raise RequestError("invalid_request", "prompt_tokens belongs to keys", "leave it away", status=422)
        packed = (
            packed_tokens(request.tokens, self._max_prompt_tokens)
            if request.tokens is not None
            else decoded_tokens(request.tokens_b64 or b"", self._max_prompt_tokens)
        )
        items = [MultimodalItem(item.hash, item.offset, item.length) for item in request.multimodal or ()]
        tokens = len(packed) // TOKEN_BYTES
        if sum(min(item.length, tokens) for item in items) > MAX_OVERLAP * tokens:
            raise RequestError(
                "invalid_request",
                "multimodal: the items are much longer than the prompt",
                "offset and length are in tokens of the prompt",
                status=422,
            )
        return TokenPrompt(packed, lora=request.lora, cache_salt=request.cache_salt, multimodal=items)

    def _key_prompt(self, request: MatchRequest, keys: list[int], block_size: int) -> KeyPrompt:
        if request.lora or request.cache_salt or request.multimodal:
            raise RequestError(
                "extras_with_keys",
                "keys already depend on LoRA, cache salt and multimodal items",
                "make the keys with them and leave them away here, or send tokens",
            )
        length = len(keys) * block_size
        if length > self._max_prompt_tokens:
            raise TooLargeError("prompt in tokens", length, self._max_prompt_tokens, "max_prompt_tokens")
        if request.prompt_tokens is not None and request.prompt_tokens < length:
            raise RequestError(
                "invalid_request",
                f"prompt_tokens is less than {len(keys)} blocks of {block_size}",
                "a key stands for a full block",
                status=422,
            )
        return KeyPrompt(unsigned(keys, "keys"), request.prompt_tokens)
