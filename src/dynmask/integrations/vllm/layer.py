"""A policy at one layer of a model whose keys lie in pages."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import bad
from ...masks import Mask
from ...plan import Plan
from ...policies import Causal, Dam, Elastic, Gated, Layer, Streaming
from ...policies.base import evicts, for_prompts_alone, looks_before_rotation
from ..asking import ask, chooses, compute, keeps
from .batch import Batch, Request
from .pages import Pages, Scores

LOOKS_AT_NOTHING = (Causal, Streaming, Dam, Elastic)
"""Policies that need no keys to choose: none are gathered for them while tokens are decoded."""

EVERY_KEY = Causal()
"""What answers for decoded tokens where the policy is for prompts alone."""

SAME_IN_ALL_LAYERS = (Causal, Streaming)
"""Policies whose lists all layers share."""

Unrotate = Callable[[int], Callable[[Tensor], Tensor] | None]
"""From the position of a first key to what takes the rotation off the keys from there on."""


def whole_up_to(policy: Any, index: int, heads: int) -> float:
    """Keys up to which every query of a layer is known to read each of them."""
    if isinstance(policy, Causal):
        return math.inf
    if isinstance(policy, Gated):
        return max(policy.dense_up_to, min(policy.windows(index, heads)))
    return policy.retention(index).least if evicts(policy) else 0


def _prompts_alone(policy: Any, phase: str) -> bool:
    """Whether decoded tokens read every key, by the policy or by the ``phase`` of the settings."""
    return phase == "prefill" or for_prompts_alone(policy)


def decodes_whole(policy: Any, phase: str) -> bool:
    """Whether every decoded token reads every key, and leaves nothing beside the cache.

    So a step of decoded tokens alone is plain attention, whatever the layer. Not where keys have
    scores: those of the decoded ones are asked for in a later turn.

    Args:
        policy: what decides.
        phase: of the settings, "both" or "prefill".
    """
    whole = isinstance(policy, Causal) or _prompts_alone(policy, phase)
    return whole and not looks_before_rotation(policy)


def reads_all(policy: Any, request: Request, whole: float, phase: str = "both") -> bool:
    """Whether a request's queries are known to read every key, before the policy is asked.

    ``whole`` is that of :func:`whole_up_to`, which a layer asks once; ``phase`` that of the
    settings.
    """
    decodes = request.phase == "decode" and _prompts_alone(policy, phase)
    return decodes or request.keys <= whole


class PagedLayer:
    """Attention of one layer's requests under a policy.

    Args:
        policy: what decides, for the heads of this process.
        index: number of the layer in the model.
        heads, kv_heads: of this process.
        head_dim: dimensions of a query and of a key.
        scale: of the logits.
        window: the model's own sliding window, its own key counted, or None.
        s_aux: the model's own attention sinks [heads], or None.
        impl: implementation of ``dynmask.attention``.
        unrotate: for policies that score keys as they were before rotation.
        phase: "prefill" where decoded tokens read every key whatever the policy, or "both".
    """

    def __init__(
        self,
        policy: Any,
        index: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        window: int | None = None,
        s_aux: Tensor | None = None,
        impl: str = "auto",
        unrotate: Unrotate | None = None,
        phase: str = "both",
    ) -> None:
        self.policy, self.index, self.phase = policy, index, phase
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.scale, self.window, self.s_aux, self.impl = scale, window, s_aux, impl
        self._unrotate = unrotate
        self._whole = whole_up_to(policy, index, heads)
        self._prompts_alone = _prompts_alone(policy, phase)
        self._by_score = window is None and (chooses(policy, index) or keeps(policy, index))
        self._scores: Scores | None = None

    def reads_all(self, batch: Batch) -> bool:
        """Whether no request of a step needs a choice; layers that ask alike ask once."""
        name = ("reads all", self._whole)
        if name not in batch.memo:
            own = self._whole, self.phase
            batch.memo[name] = all(reads_all(self.policy, r, *own) for r in batch)
        return bool(batch.memo[name])

    def attend(
        self,
        cache: Tensor,
        batch: Batch,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        out: Tensor,
    ) -> None:
        """Attention of a step's requests, written into ``out``.

        Args:
            cache: of the layer, the step's own keys and values written.
            batch: the requests.
            query: [tokens, h, d].
            key, value: of the step's tokens, [tokens, g, d], or None.
            out: [tokens, h, d].
        """
        pages = Pages.of(cache, self.kv_heads, self.head_dim)
        self.note_scores(pages, batch)
        decoded = []
        for request in batch:
            if request.phase == "decode" and pages.step is not None:
                decoded.append(request)
                continue
            rows = slice(request.start, request.stop)
            q = query[rows].transpose(0, 1)[None]
            if request.before or key is None or value is None:
                k, v = pages.gather(batch.table[request.number], self._first(request), request.keys)
            else:
                k, v = (x[rows].transpose(0, 1)[None] for x in (key, value))
            mask, bias = self._ask(batch, request, q, k, v)
            result = compute(q, k, v, mask, bias, self.scale, self.s_aux, self.impl)
            out[rows] = result[0].transpose(0, 1)
        if decoded:
            self._decode(pages, batch, decoded, query, out)

    def note_scores(self, pages: Pages, batch: Batch) -> None:
        """Score the step's tokens, for policies that choose by scores."""
        if not self._by_score:
            return
        if self._scores is None:
            self._scores = Scores(pages)
        for request in batch:
            table = batch.table[request.number]
            k, v = pages.gather(table, request.before, request.keys)
            unrotate = None if self._unrotate is None else self._unrotate(request.before)
            layer = Layer(self.index, request.before, unrotate)
            score = self.policy.scores if evicts(self.policy) else self.policy.score
            self._scores.write(table, request.before, score(k, v, layer))

    def _first(self, request: Request) -> int:
        """Position of the first key that a layer with a window of its own still has."""
        return 0 if self.window is None else max(request.before - self.window + 1, 0)

    def _ask(
        self, batch: Batch, request: Request, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Mask, Tensor | None]:
        """What the policy answers for one request, or nobody where every key is read."""
        scores = None
        decodes = request.phase == "decode" and self._prompts_alone
        policy = EVERY_KEY if decodes else self.policy
        if self._scores is not None:
            scores = self._scores.read(batch.table[request.number], request.keys)
        layer = Layer(self.index, self._first(request))
        rest = self.window, batch.memo, scores
        return ask(policy, layer, request.phase, query, key, value, *rest)

    def _decode(
        self, pages: Pages, batch: Batch, requests: list[Request], query: Tensor, out: Tensor
    ) -> None:
        """One token of each request, all in one call that reads the pages as they lie."""
        biased: list[Request] = []
        shared = self._prompts_alone or isinstance(self.policy, SAME_IN_ALL_LAYERS)
        name = ("decode", pages.step, pages.size, self.window)
        plan = batch.memo.get(name) if shared else None
        if plan is None:
            asked: list[tuple[Request, Mask]] = []
            for request in requests:
                q = query[request.start : request.stop].transpose(0, 1)[None]
                k, v = self._to_look_at(pages, batch, request)
                mask, bias = self._ask(batch, request, q, k, v)
                if bias is None:
                    asked.append((request, mask))
                    continue
                # a bias lies beside keys that lie together
                biased.append(request)
                k, v = pages.gather(batch.table[request.number], self._first(request), request.keys)
                result = compute(q, k, v, mask, bias, self.scale, self.s_aux, self.impl)
                out[request.start : request.stop] = result[0].transpose(0, 1)
            lists = [self._list(pages, batch, *pair) for pair in asked]
            plan = join(lists, pages.flat()[0].shape[2]) if lists else None
            if shared:
                batch.memo[name] = plan
        if plan is None:
            return
        rows = [r.start for r in requests if r not in biased]
        take: Any = rows
        if rows == list(range(rows[0], rows[0] + len(rows))):
            take = slice(rows[0], rows[0] + len(rows))
        q = query[take].transpose(0, 1)[None]
        result = compute(q, *pages.flat(), plan, None, self.scale, self.s_aux, self.impl)
        out[take] = result[0].transpose(0, 1)

    def _to_look_at(self, pages: Pages, batch: Batch, request: Request) -> tuple[Tensor, Tensor]:
        """Keys and values to choose by; a shape alone where nobody looks."""
        first, heads = self._first(request), self.kv_heads
        nobody = self._prompts_alone or isinstance(self.policy, LOOKS_AT_NOTHING)
        if nobody or (self._by_score and evicts(self.policy)):
            nothing = pages.cache.new_empty(1).expand(1, heads, request.keys - first, self.head_dim)
            return nothing, nothing
        return pages.gather(batch.table[request.number], first, request.keys)

    def _list(self, pages: Pages, batch: Batch, request: Request, mask: Mask) -> Lists:
        """The slots that a decoded token reads."""
        first = self._first(request)
        name = ("slots", request.number, pages.step, pages.size, first)
        slots = batch.memo.get(name)
        if slots is None:
            slots = pages.slots(batch.table[request.number], first, request.keys)
            batch.memo[name] = slots
        return paged(mask, slots)


class Lists(NamedTuple):
    """Slots that one query row reads: those of 1 head for all, of the kv heads or the query heads.

    Attributes:
        index: int32 [heads, cap], the slots, then anything.
        count: int32 [heads], how many there are.
    """

    index: Tensor
    count: Tensor

    def expand(self, heads: int, cap: int) -> Lists:
        """The same for so many heads (grouped order), with room for so many slots."""
        times, more = heads // len(self.count), cap - self.index.shape[1]
        index = torch.nn.functional.pad(self.index, (0, more))
        return Lists(*(x.repeat_interleave(times, 0) for x in (index, self.count)))


def paged(mask: Mask, slots: Tensor) -> Lists:
    """What a mask of one query row lets through, its keys replaced by the slots where they lie.

    A list of single keys that the one row sees needs no rule: a kernel never looks at what number
    a key has. So the kernels read pages as they lie.

    Args:
        mask: of one query row.
        slots: of each key, int32 [keys].
    """
    if mask.queries != 1:
        raise bad("paged", "a mask of one query row", mask.queries)
    if mask.is_causal:
        return Lists(slots[None], torch.full_like(slots[:1], len(slots)))
    plan = mask.lower(tile=1).single_keys()
    index = plan.index[:, 0].clamp(0, len(slots) - 1)  # padding may be anything
    return Lists(slots[index.long()], plan.count[:, 0])


def join(lists: list[Lists], slots: int) -> Plan:
    """One plan of single rows: request i is query row i.

    Args:
        lists: of each request.
        slots: of the whole cache.
    """
    heads, cap = (max(x.index.shape[i] for x in lists) for i in (0, 1))
    wide = [own.expand(heads, cap) for own in lists]
    number = torch.arange(len(lists), dtype=torch.int32, device=wide[0].index.device)
    count = torch.stack([own.count for own in wide], 1)
    return Plan(
        batch=torch.zeros_like(number),
        row=number,
        rows=torch.ones_like(number),
        position=number,
        index=torch.stack([own.index for own in wide], 1),
        full=count,
        count=count,
        tile=1,
        shape=(1, len(lists), slots),
    )


__all__ = [
    "Lists",
    "PagedLayer",
    "decodes_whole",
    "join",
    "paged",
    "reads_all",
    "whole_up_to",
]
