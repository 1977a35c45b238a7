"""The cache of a fake engine, with vLLM's semantics and without I/O: requests go in, events come out.

One `step()` is one engine step: every running request computes its next token or prompt chunk, waiting ones join,
finished ones free their blocks, and the step's events come back in the order in which vLLM sends them:

    [AllBlocksCleared of an earlier reset] [evictions, then the store, per request] [CPU stores] [CPU evictions]

Invariant: counting +1 per stored and -1 per removed hash gives `held()` after every step. This is the truth that
indexes are judged by, so it shares no code with them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from itertools import groupby, takewhile
from typing import TYPE_CHECKING

from kvindexer.testing.cpu_tier import CpuTier
from kvindexer.testing.events import CPU, AllBlocksCleared, BlockRemoved, BlockStored
from kvindexer.testing.hashing import BlockHasher, CacheScope, MultimodalItem
from kvindexer.testing.physical import PhysicalBlocks
from kvindexer.testing.request import Request, answer

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterable, Sequence

    from kvindexer.testing.events import Digest, Event
    from kvindexer.testing.physical import GroupedDigest

GROUP = 0
DEFAULT_STEP_TOKENS = 8192


class BlockPool:
    """KV blocks of one engine: prefix cache, eviction, and optionally a CPU tier.

    `num_blocks` counts vLLM's placeholder block, so one less is usable. `max_step_tokens` is the budget that
    chunks long prompts. `set_like` announces a hash only with its first copy and its last (SGLang, stores).
    `reuse_empty_first` is vLLM's habit since 0.24 of taking blocks without reusable content before all others.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        hash_seed: int | str = 0,
        cpu_blocks: int = 0,
        max_step_tokens: int = DEFAULT_STEP_TOKENS,
        set_like: bool = False,
        reuse_empty_first: bool = True,
    ) -> None:
        self.block_size = block_size
        self._seed = hash_seed
        self._max_step_tokens = max_step_tokens
        self._set_like = set_like
        self._hasher = BlockHasher(hash_seed, block_size)
        self._blocks = PhysicalBlocks(num_blocks, reuse_empty_first=reuse_empty_first)
        self._cpu = CpuTier(cpu_blocks)
        self._lora_ids: dict[str, int] = {}
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._events: list[Event] = []
        self._offload: list[BlockStored] = []

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._running or self._waiting)

    def held(self) -> dict[GroupedDigest, int]:
        """Return what the GPU holds: (group, digest) -> physical copies."""
        copies: Counter[GroupedDigest] = self._blocks.held()
        return dict.fromkeys(copies, 1) if self._set_like else dict(copies)

    def cpu_held(self) -> set[GroupedDigest]:
        """Return what the CPU tier holds, as (group, digest)."""
        return self._cpu.held()

    def digests(self, tokens: Sequence[int], salt: str | None = None, lora: str | None = None) -> list[Digest]:
        """Return the digests of a prompt's full blocks."""
        digests: list[Digest] = []
        self._hasher.extend(digests, tokens, CacheScope(salt, lora))
        return digests

    def cached_tokens(self, tokens: Sequence[int], salt: str | None = None, lora: str | None = None) -> int:
        """Return what the engine would report as cached if this prompt came now, alone."""
        digests = self.digests(tokens, salt, lora)
        gpu, _ = self._lookup(digests, len(tokens))
        # the request would wait for copies that are under way
        offloaded = takewhile(lambda key: key in self._cpu or self._cpu.is_pending(key), self._keys(digests[gpu:]))
        return (gpu + sum(1 for _ in offloaded)) * self.block_size

    def submit(
        self,
        tokens: Sequence[int],
        *,
        max_tokens: int = 1,
        salt: str | None = None,
        lora: str | None = None,
        multimodal: Iterable[MultimodalItem] = (),
        session_id: str | None = None,
        output: Sequence[int] | None = None,
    ) -> Request:
        """Queue a request; `output` overrides the made-up answer and its length."""
        if output is None:
            output = answer(self._seed, tokens, lora, max_tokens)
        if not tokens or not output:
            raise ValueError(f"expected at least one prompt and one output token, got {len(tokens)}, {len(output)}")
        if (needed := self._blocks_for(len(tokens) + len(output) - 1)) > self._blocks.usable:
            raise ValueError(f"the request needs {needed} blocks, the pool has {self._blocks.usable}")
        scope = CacheScope(salt, lora, tuple(multimodal))
        request = Request(list(tokens), len(tokens), output, scope, session_id)
        self._waiting.append(request)
        return request

    def step(self) -> list[Event]:
        """Run one engine step; an idle engine does nothing, not even sending what is due."""
        if not self.busy:
            return []
        budget = self._max_step_tokens
        for request in list(self._running):
            if request in self._running:
                budget -= self._advance(request, budget)
        while self._waiting and budget > 0 and self._admit(self._waiting[0]):
            request = self._waiting.popleft()
            self._running.append(request)
            if not request.loading:
                budget -= self._advance(request, budget)
        for request in [r for r in self._running if r.finished]:
            self._running.remove(request)
            self._blocks.release(request.blocks)
        self._events += self._cpu.finish()
        if evicted := self._cpu.begin(self._offload):
            self._events.append(BlockRemoved(tuple(evicted), CPU))
        events, self._events, self._offload = self._events, [], []
        return events

    def reset(self, *, cpu: bool = False) -> bool:
        """Forget the prefix cache, which the next step announces; False and no effect while requests run.

        With `cpu` the CPU tier is emptied too, which no engine announces.
        """
        if not self._blocks.clear():
            return False
        self._events.append(AllBlocksCleared())
        if cpu:
            self._cpu.clear()
        return True

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _keys(self, digests: Iterable[Digest]) -> list[GroupedDigest]:
        return [(GROUP, digest) for digest in digests]

    def _lookup(self, digests: Sequence[Digest], length: int) -> tuple[int, int]:
        """Return how many leading blocks are on the GPU, and how many more on the CPU."""
        reusable = (length - 1) // self.block_size
        gpu = 0
        while gpu < reusable and self._blocks.find((GROUP, digests[gpu])) is not None:
            gpu += 1
        cpu = sum(1 for _ in takewhile(self._cpu.__contains__, self._keys(digests[gpu:])))
        return gpu, cpu

    def _admit(self, request: Request) -> bool:
        """Give a waiting request its cached prefix, unless the pool is too full for its first chunk."""
        self._hasher.extend(request.digests, request.tokens, request.scope)
        gpu, cpu = self._lookup(request.digests, len(request.tokens))
        if any(map(self._cpu.is_pending, self._keys(request.digests[gpu + cpu :][:1]))):
            return False  # vLLM waits for a copy that it can read a step later
        keys = self._keys(request.digests[: gpu + cpu])
        hits = [block for key in keys[:gpu] if (block := self._blocks.find(key)) is not None]
        idle_hits = sum(map(self._blocks.is_free, hits))
        chunk = min(len(request.tokens), (gpu + cpu) * self.block_size + self._max_step_tokens)
        if self._blocks_for(chunk) - len(hits) + idle_hits > self._blocks.free_count:
            return False
        self._blocks.touch(hits)
        self._cpu.touch(key for key in keys if key in self._cpu)
        request.blocks = hits
        request.announced = gpu
        request.computed = gpu * self.block_size
        request.loading = cpu
        self._allocate(request, gpu + cpu)
        if request.cached_tokens is None:
            request.cached_tokens = (gpu + cpu) * self.block_size
        return True

    def _advance(self, request: Request, budget: int) -> int:
        """Compute a request's next tokens; return how many, 0 if it had to give way."""
        if request.loading:
            self._finish_load(request)
        tokens = min(len(request.tokens) - request.computed, budget)
        target = self._blocks_for(request.computed + tokens)
        while target - len(request.blocks) > self._blocks.free_count:
            victim = self._running.pop()
            self._blocks.release(victim.blocks)
            victim.forget_progress()
            self._waiting.appendleft(victim)
            if victim is request:
                return 0
        self._allocate(request, target)
        request.computed += tokens
        self._announce(request)
        if request.computed == len(request.tokens):
            request.sample()
        return tokens

    def _finish_load(self, request: Request) -> None:
        request.computed += request.loading * self.block_size
        request.loading = 0
        self._announce(request)
        if request.computed == len(request.tokens):
            request.computed -= 1  # the last token is computed again: its logits were never stored

    def _allocate(self, request: Request, total: int) -> None:
        blocks, evicted = self._blocks.allocate(max(0, total - len(request.blocks)))
        request.blocks += blocks
        if self._set_like:
            evicted = [key for key in dict.fromkeys(evicted) if self._blocks.find(key) is None]
        self._events += [BlockRemoved((digest,), group_idx=group) for group, digest in evicted]

    def _announce(self, request: Request) -> None:
        """Make a request's newly full blocks reusable and say so."""
        self._hasher.extend(request.digests, request.tokens, request.scope)
        full = range(request.announced, request.computed // self.block_size)
        silent = {i for i in full if self._set_like and self._blocks.find((GROUP, request.digests[i])) is not None}
        for i in full:
            self._blocks.fill(request.blocks[i], (GROUP, request.digests[i]))
        request.announced = max(request.announced, full.stop)
        for is_silent, run in groupby(full, silent.__contains__):
            indexes = list(run)
            if not is_silent:
                self._events.append(self._stored(request, indexes[0], indexes[-1] + 1))
        if self._cpu.capacity:
            prompt_blocks = range(full.start, min(full.stop, request.prompt_length // self.block_size))
            self._offload += [replace(self._stored(request, i, i + 1), medium=CPU) for i in prompt_blocks]

    def _stored(self, request: Request, start: int, end: int) -> BlockStored:
        size, scope = self.block_size, request.scope
        lora_id = scope.lora and self._lora_ids.setdefault(scope.lora, len(self._lora_ids) + 1)
        return BlockStored(
            block_hashes=tuple(request.digests[start:end]),
            parent_block_hash=request.digests[start - 1] if start else None,
            token_ids=tuple(request.tokens[start * size : end * size]),
            block_size=size,
            base_block_idx=start,
            lora_id=lora_id or None,
            lora_name=scope.lora,
            extra_keys=tuple(scope.extra_keys(i * size, (i + 1) * size) for i in range(start, end)),
            session_id=request.session_id,
            cache_salt=scope.salt,
        )
