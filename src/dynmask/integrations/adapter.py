"""One attention call of a transformers model: place its sequences, ask the policy, attend."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..cache import Live
from ..errors import bad
from ..masks import LifetimeMask, Mask, MixedMask, PlacedMask
from ..policies import H2O, Gated, Layer
from ..policies.base import Glancing, looks_before_rotation
from ..policies.blocks import Pools
from .asking import ask, chooses, compute
from .cache import BoundedCache
from .calls import NO_CALL, Call, check_asked, take_call
from .checks import check_call
from .context import Context
from .gated_cache import GatedCache, GatedLayer, Heads
from .heavy_cache import HeavyHitterCache
from .heavy_cache import attend as attend_heavy
from .placement import Placement, is_linear
from .rotary import unrotate_of


class Site(NamedTuple):
    """Which layer is called, by which policy it is ruled, and with what.

    Attributes:
        module: the attention module.
        index: number of the layer.
        policy: what decides.
        where: its sequences.
        scale: of the logits.
        s_aux: the model's own attention sinks [h], or None.
        call: what else the module was called with, for policies whose cache drops keys.
        heads: query heads that are asked about; None for all of the layer.
        pools: from batch rows to what a cache knows of their keys, see ``Layer.pools``.
        scores: of the call's keys, [b, g, n], where they are known, see ``Layer.scores``.
    """

    module: nn.Module
    index: int
    policy: Any
    where: Placement
    scale: float
    s_aux: Tensor | None
    call: Call
    heads: Heads | None = None
    pools: Callable[[slice], Pools] | None = None
    scores: Tensor | None = None

    def pools_of(self, rows: slice) -> Pools | None:
        """What a cache knows of the keys of some batch rows."""
        return None if self.pools is None else self.pools(rows)


class Adapter:
    """The attention function of one run, or of all converted models."""

    def __init__(self, impl: str) -> None:
        self._impl = impl
        self._placements: dict[tuple[int, ...], tuple[weakref.ref[Tensor], Placement]] = {}
        self._context: Context | None = None
        self._first_layer = 0

    @property
    def measures_mass(self) -> bool:
        """Whether the true attention is computed for some rows."""
        return False

    # what a run and converted models do differently

    def _policy(self, module: nn.Module) -> Any:
        """The policy of a layer; ValueError for a layer that is none of ours."""
        raise NotImplementedError

    def _check_heads(self, heads: int) -> None:
        """Refuse query heads that the policy was not made for."""

    def _note(self, site: Site, phase: str, query: Tensor, mask: Mask, bias: Tensor | None) -> None:
        """Hear of an attention call that is about to be computed."""

    def _hear(self, site: Site, phase: str, what: str, maps: Tensor) -> None:
        """Hear what a policy did beyond its settings; see ``Layer.tell``."""

    def _measure(
        self,
        site: Site,
        phase: str,
        mask: Mask,
        first_key: int,
        query: Tensor,
        key: Tensor | None,
    ) -> None:
        """Hear of one mask; ``key`` is None where the cache has evicted some."""

    def _count(self, site: Site, phase: str, kept: Callable[[], Tensor], causal: int) -> None:
        """Hear how many pairs each head of a call has read [h], of how many causal ones."""

    def _teach(self, site: Site, groups: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Hear of the queries, keys and values of each sequence of a call."""

    # the attention function

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """The attention function: query [b, h, q, d], returns [b, q, h, dv]."""
        policy = self._policy(module)
        check_call(module, dropout, softcap, kwargs)
        self._check_heads(query.shape[1])
        if not query.dtype == key.dtype == value.dtype:
            query, key = _as_projected(query, key, value)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        call = _call_for(policy, module)
        where = self._placement(attention_mask, query, key, sliding_window)
        index = int(module.layer_idx)  # type: ignore[arg-type]
        if index == self._first_layer:
            check_asked(where, query.shape[2])
            if attention_mask is None:
                check_one_sequence(kwargs.get("position_ids"), query.shape[2])
        site = Site(module, index, policy, where, scale, s_aux, call)
        if self._context is not None:
            out = self._in_context(self._context, site, query, key, value)
        elif isinstance(call.cache, BoundedCache):
            linear = attention_mask is not None and is_linear(attention_mask)
            out = self._bounded(site, call.cache, linear, query, key, value)
        elif isinstance(call.cache, GatedCache):
            out = self._gated(site, call.cache, attention_mask, query, key, value)
        elif isinstance(call.cache, HeavyHitterCache):
            linear = attention_mask is not None and is_linear(attention_mask)
            out = attend_heavy(self, site, linear, query, key, value)
        else:
            out = self._place(site, query, key, value)
        return out.transpose(1, 2).contiguous(), None

    def _place(self, site: Site, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Ask the policy about each sequence, attend once: [b, h, q, dv]."""
        where = site.where
        batch, heads, queries, _ = query.shape
        phase = "decode" if queries == 1 and where.has_past else "prefill"
        if not where.spans:
            return query.new_zeros(batch, heads, queries, value.shape[-1])
        groups = where.groups(batch)
        masks, biases, parts = [], [], []
        for batches, span, first_key in groups:
            q = _part(query, batches, span.queries)
            k, v = _part(key, batches, span.keys), _part(value, batches, span.keys)
            unrotate = unrotate_of(site.module, site.call, batches, span.queries, first_key)
            tell, pools = partial(self._hear, site, phase), site.pools_of(batches)
            scores = None if site.scores is None else site.scores[batches, :, span.keys]
            layer = Layer(site.index, first_key, unrotate, tell, pools, scores)
            mask, bias = self._ask(site, phase, layer, q, k, v)
            self._measure(site, phase, mask, first_key, q, k)
            masks.append(mask)
            biases.append(bias)
            parts.append((q, k, v))
        self._teach(site, parts)
        if len(groups) > 1 and not _apart(masks):
            placed = PlacedMask(tuple(masks), where.spans, batch, queries, key.shape[2])
            bias = None
            given = next((part for part in biases if part is not None), None)
            if given is not None:
                bias = given.new_zeros(batch, given.shape[1], key.shape[2])
                for (batches, span, _), part in zip(groups, biases, strict=True):
                    if part is not None:
                        bias[batches, :, span.keys] = part
            self._note(site, phase, query, placed, bias)
            return self._compute(site, query, key, value, placed, bias)
        self._note(site, phase, query, masks[0], biases[0])
        out = None
        for (batches, span, _), mask, bias, (q, k, v) in zip(
            groups, masks, biases, parts, strict=True
        ):
            part = self._compute(site, q, k, v, mask, bias)
            if part.shape[:3] == query.shape[:3]:
                return part
            if out is None:
                out = query.new_zeros(batch, heads, queries, value.shape[-1])
            out[batches, :, span.queries] = part
        assert out is not None
        return out

    def _in_context(
        self, context: Context, site: Site, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """Ask the policy about the whole sequence, attend for this process's rows of it."""
        head = site.index == self._first_layer
        where = context.place(site.where, query, key, site.call.cache, head)
        rows = slice(0, len(query)), slice(0, query.shape[2])
        unrotate = unrotate_of(site.module, site.call, *rows, 0)
        site = site._replace(where=where)
        looks = isinstance(site.policy, Glancing) and not self.measures_mass
        seen = site.policy.rows_read(context.split.length, site.index) if looks else None
        with torch.no_grad():
            every = context.looked_at(query, seen)
        k, v = context.all(key), context.all(value)
        context.keep(site.index, k, v)
        hear = partial(self._hear, site, "prefill")
        layer = Layer(site.index, 0, context.unrotate(unrotate, key), hear)
        mask, bias = self._ask(site, "prefill", layer, every, k, v)
        self._measure(site, "prefill", mask, 0, every, k)
        self._note(site, "prefill", every, mask, bias)

        def attend(q: Tensor, own: Mask) -> Tensor:
            part = None if bias is None else bias[..., : own.keys]
            return self._compute(site, q, k[:, :, : own.keys], v[:, :, : own.keys], own, part)

        return context.rows(query, mask, attend)

    def _bounded(
        self,
        site: Site,
        cache: BoundedCache,
        linear: bool,
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> Tensor:
        """Attend over what the cache has kept and the new tokens: [b, h, q, dv]."""
        policy, where = site.policy, site.where
        store = cache.store(site.module, site.index, policy, where, linear, query.shape[0])
        rows = slice(0, query.shape[0])
        new = slice(0, query.shape[2])
        unrotate = unrotate_of(site.module, site.call, rows, new, 0, where.memo)
        first_key = min(where.first_keys, default=0)
        layer = Layer(site.index, first_key, unrotate)
        own_window = chooses(policy, site.index) and where.window is not None
        if own_window:
            scores = torch.zeros(key.shape[:3], device=key.device)
        else:
            with torch.no_grad():
                scores = policy.scores(key, value, layer)
        phase = "decode" if query.shape[2] == 1 and any(store.seen) else "prefill"

        def compute(q: Tensor, live: Live, first: int) -> Tensor:
            self._measure_live(site, phase, q, live, first, store.seen)
            bias = None if own_window else policy.bias(live.scores, layer)
            self._note(site, phase, q, live.mask, bias)
            return self._compute(site, q, live.key, live.value, live.mask, bias)

        return store.attend(query, key, value, scores, where.spans, compute=compute)

    def _gated(
        self,
        site: Site,
        cache: GatedCache,
        mask: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> Tensor:
        """Attend over what the cache has kept and the new tokens: [b, h, q, dv]."""
        if not isinstance(cache.layers[site.index], GatedLayer):  # a sliding window of its own
            return self._place(site._replace(policy=cache.policy), query, key, value)
        from .gated_call import attend

        return attend(self, site, mask is not None and is_linear(mask), query, key, value)

    def _measure_live(
        self, site: Site, phase: str, query: Tensor, live: Live, first: int, seen: list[int]
    ) -> None:
        """Tell of masks over live keys; the causal area is that of all keys."""
        dropped = first + query.shape[2] - live.key.shape[2]
        ragged = query.shape[2] == 1 and len(seen) == len(query) and len(set(seen)) > 1
        if not ragged:
            self._measure(site, phase, live.mask, dropped, query, None)
            return
        for row, count in enumerate(seen):
            death = live.mask.death[row : row + 1] if live.mask.batch > 1 else live.mask.death
            own = LifetimeMask(death, live.mask.queries, live.mask.plain, live.mask.most)
            one = query[row : row + 1]
            self._measure(site, phase, own, count - live.key.shape[2], one, None)

    def _ask(
        self, site: Site, phase: str, layer: Layer, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Mask, Tensor | None]:
        """The mask of one sequence (or of equal ones), within the model's window, and a bias."""
        where = site.where
        return ask(site.policy, layer, phase, query, key, value, where.window, where.memo)

    def _compute(
        self,
        site: Site,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Mask,
        bias: Tensor | None,
    ) -> Tensor:
        return compute(query, key, value, mask, bias, site.scale, site.s_aux, self._impl)

    def _placement(
        self, mask: Tensor | None, query: Tensor, key: Tensor, sliding_window: int | None
    ) -> Placement:
        """Where the sequences lie; read from the device once for each mask and forward."""
        batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
        if mask is None:
            return Placement.dense(batch, queries, keys, sliding_window)
        name = (id(mask), queries, keys, sliding_window or 0)
        known = self._placements.get(name)
        if known is not None and known[0]() is mask:
            return known[1]
        if is_linear(mask):
            where = Placement.from_linear(mask, queries, keys)
        else:
            where = Placement.from_bool(mask, batch, queries, keys, sliding_window)
        self._placements[name] = weakref.ref(mask), where
        return where


def _apart(masks: list[Mask]) -> bool:
    """Whether sequences are computed one by one; others share one plan and one call.

    Plain causal ones are fastest so, heads of several kinds have no common plan.
    """
    return all(m.is_causal for m in masks) or any(isinstance(m, MixedMask) for m in masks)


def _part(x: Tensor, rows: slice, positions: slice) -> Tensor:
    """Some rows and positions of [b, heads, n, d]; the tensor itself where those are all."""
    batch, _, n, _ = x.shape
    whole = rows.stop - rows.start == batch and positions.stop - positions.start == n
    return x if whole else x[rows, :, positions]


def _as_projected(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys in the dtype of the values under autocast.

    Norms and the rotation may have computed in a wider dtype than the projections.
    """
    if not torch.is_autocast_enabled(query.device.type):
        return query, key
    return query.to(value.dtype), key.to(value.dtype)


def check_one_sequence(positions: Tensor | None, queries: int) -> None:
    """Raise ValueError where positions restart and no mask says which sequences there are."""
    if positions is None or positions.shape[-1] != queries or queries == 1:
        return
    if bool((positions.diff(dim=-1) != 1).any()):
        raise bad(
            "position_ids", "one sequence in each row where there is no mask", "several, packed",
            "Pass sequences one by one (DeepSpeed Ulysses drops the mask that tells them apart).",
        )  # fmt: skip


def _call_for(policy: Any, module: nn.Module) -> Call:
    """What a module is being called with, where there is a cache that drops keys under a policy."""
    if looks_before_rotation(policy):
        return take_call(module)
    if not isinstance(policy, Gated | H2O):
        return NO_CALL
    cache, _, positions = take_call(module)
    return Call(cache, None, positions)  # nothing is scored: keys stay as they were rotated
