"""One attention call of a layer whose keys lie in a GatedCache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..cache import KeyStore, Live, runs_of
from ..errors import bad
from ..hosted import HostedStore
from ..masks import LifetimeMask, Mask, MixedMask, Span
from ..plan import Plan
from ..policies import Gated, Layer
from ..policies.guard import GUARD_ROWS
from ..ragged import Part, RaggedStore, WholeStore
from .adapter import Adapter, Site
from .calls import NO_CALL
from .gated_cache import GatedCache, GatedLayer, Heads, LayerPlan
from .placement import Placement
from .rotary import unrotate_of

INF = LifetimeMask.INF


def attend(
    adapter: Adapter, site: Site, linear: bool, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Attend over what the cache has kept and the new tokens; then drop what can go: [b, h, n, dv].

    Args:
        adapter: of the run.
        site: which layer is called; its placement is about the new tokens.
        linear: whether the mask is one of tokens.
        query: [b, h, n, d].
        key: [b, g, n, d], of the new tokens.
        value: [b, g, n, dv].
    """
    cache: GatedCache = site.call.cache
    layer: GatedLayer = cache.layers[site.index]  # type: ignore[assignment]
    batch, _, n, _ = query.shape
    store = cache.arrived(site.module, layer, site.where, linear, key, value)
    runs = runs_of(site.where.spans, batch, n)
    if not runs:
        return query.new_zeros(*query.shape[:3], value.shape[-1])
    call = GatedCall(adapter, site, layer, runs, query, key, value)
    if not any(store.seen):
        return call.begin()
    if n == 1 and not layer.in_prompt(layer.tokens - 1):
        return call.decode()
    return call.go_on()


class Listener(Adapter):
    """Hears of the masks of a call, or of a part of its heads.

    What is said of all heads is passed on as it is; of the parts of a call, one is counted.
    """

    def __init__(self, whole: Adapter, parts: bool) -> None:
        super().__init__(whole._impl)
        self._whole = whole
        self._parts = parts
        self._noted = False
        self.masks: list[Mask] = []

    def _note(
        self, site: Site, phase: str, query: Tensor, mask: Mask | Plan, bias: Tensor | None
    ) -> None:
        if not (self._parts and self._noted):
            self._whole._note(site, phase, query, mask, bias)  # type: ignore[arg-type]
        self._noted = True

    def _hear(self, site: Site, phase: str, what: str, maps: Tensor) -> None:
        self._whole._hear(site, phase, what, maps)

    def _measure(
        self,
        site: Site,
        phase: str,
        mask: Mask,
        first_key: int,
        query: Tensor,
        key: Tensor | None,
    ) -> None:
        self.masks.append(mask)
        if not self._parts:
            self._whole._measure(site, phase, mask, first_key, query, key)


class GatedCall:
    """The queries, keys and values of new tokens, and where they go.

    A call is one of three: it begins the sequences, decodes one token of each, or goes on with
    several tokens (a chunk, a turn). The first and the last end with a choice of columns.

    Args:
        adapter: of the run.
        site: which layer is called.
        layer: of the cache.
        runs: for each batch row that has new tokens, from and to.
        query: [b, h, n, d].
        key: [b, g, n, d].
        value: [b, g, n, dv].
    """

    def __init__(
        self,
        adapter: Adapter,
        site: Site,
        layer: GatedLayer,
        runs: dict[int, tuple[int, int]],
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> None:
        assert layer.store is not None
        self.adapter = adapter
        self.plan: LayerPlan = layer.plan
        # keys that nobody scores stay as they were rotated
        self.site = site if self.plan.policy.keeps(site.index) else site._replace(call=NO_CALL)
        self.ragged: RaggedStore | None = layer.store.ragged
        self.whole: WholeStore | None = layer.store.whole
        self.hosted: HostedStore | None = layer.store.hosted
        self.live: tuple[KeyStore, ...] = layer.store.live
        self.held = layer.in_prompt(layer.tokens)
        self.runs = runs
        self.query, self.key, self.value = query, key, value
        self.batch, self.heads, self.n, _ = query.shape
        self.before = list(layer.store.seen) or [0] * self.batch
        self.seen = [
            count + runs[row][1] - runs[row][0] if row in runs else count
            for row, count in enumerate(self.before)
        ]
        self.listener = Listener(adapter, parts=True)
        self.kept: list[tuple[Heads, Callable[[], Tensor]]] = []
        """Query heads, and how many pairs they read: [rows, heads]."""

    def begin(self) -> Tensor:
        """The call that begins the sequences: every key is there."""
        listener = Listener(self.adapter, parts=False)
        site = self.site._replace(policy=self.plan.policy, scores=self._scores())
        out = listener._place(site, self.query, self.key, self.value)
        groups = self._groups(site.where)
        self._extend()
        self._attend_live(None, "prefill", site.scores)
        if self.whole is not None:
            self._remember(groups, listener.masks)
        if self.ragged is not None:
            freed, queries = self.plan.freed, self.plan.freed_queries
            parts = []
            for (rows, span), mask in zip(groups, listener.masks, strict=True):
                own = slice(rows[0], rows[-1] + 1)
                k, v = (freed.take(x[own, :, span.keys]) for x in (self.key, self.value))
                keys = k.shape[2]
                positions = torch.arange(keys, device=k.device)[None, None]
                death = self._ends(mask, queries, len(rows), keys, keys)
                parts.append(Part(rows, range(len(freed)), positions, k, v, death, keys))
            self.ragged.fill(self.batch, parts)
        return out

    def decode(self) -> Tensor:
        """One token of each row, after a choice was made."""
        out, plan = self._out(), self.plan
        self._extend()
        if self.whole is not None:
            recalls = plan.keeps and not plan.anew
            part = (
                self._recall()
                if recalls
                else self._ask(self.whole, plan.whole_queries, plan.whole_policy)
            )
            plan.whole_queries.put(out, part)
        if self.hosted is not None:
            plan.hosted_queries.put(out, self._fetch())
        self._attend_live(out, "decode", self._scores())
        if self.ragged is not None:
            freed, queries = self.plan.freed, self.plan.freed_queries
            self.ragged.add(freed.take(self.key), freed.take(self.value), list(self.runs))
            k, v, lists = self.ragged.read()
            queries.put(out, self._compute(queries, k, v, lists))
            self.kept.append((queries, lambda: lists.count.T))
        self._report("decode")
        return out

    def go_on(self) -> Tensor:
        """Several tokens after others: a chunk of a prompt, or a new turn."""
        out, plan = self._out(), self.plan
        self._extend()
        if self.whole is not None:
            part = self._ask(self.whole, plan.whole_queries, plan.whole_policy)
            plan.whole_queries.put(out, part)
            self._remember(self._groups(self._placement()), self.listener.masks)
        if self.hosted is not None:
            part = self._ask(self.hosted, plan.hosted_queries, plan.hosted_policy)
            plan.hosted_queries.put(out, part)
        self._attend_live(out, "prefill", self._scores())
        if self.ragged is not None:
            order, counts = self.ragged.live()
            parts = [
                self._bunch(out, row, heads, slots)
                for row in self.runs
                for heads, slots in _alike(order[row], counts[row])
            ]
            self.ragged.fill(self.batch, parts)
        self._report("prefill")
        return out

    # kv heads that keep all keys

    def _extend(self) -> None:
        """Keep the new tokens."""
        for store, heads in ((self.whole, self.plan.whole), (self.hosted, self.plan.hosted)):
            if store is not None:
                store.extend(heads.take(self.key), heads.take(self.value), self.runs)

    def _placement(self) -> Placement:
        """Where the sequences lie in what is kept: from the first key of each row on."""
        spans = tuple(Span(row, 0, self.seen[row], *run) for row, run in self.runs.items())
        return Placement(spans, (0,) * len(spans))

    def _groups(self, where: Placement) -> list[tuple[list[int], Span]]:
        """Batch rows that the policy is asked about together, and their span."""
        groups = where.groups(self.batch)
        return [(list(range(rows.start, rows.stop)), span) for rows, span, _ in groups]

    def _ask(self, store: WholeStore | HostedStore, heads: Heads, policy: Gated) -> Tensor:
        """Attention under what the policy answers: [b, h, n, dv]."""
        where = self._placement()
        site = self._asked(store, heads, policy)._replace(where=where)
        before = len(self.listener.masks)
        out = self.listener._place(site, heads.take(self.query), *store.held())
        masks = self.listener.masks[before:]
        for (rows, _), mask in zip(self._groups(where), masks, strict=True):
            self._count(heads, mask, len(rows))
        return out

    def _asked(self, store: WholeStore | HostedStore, heads: Heads, policy: Gated) -> Site:
        """The site of query heads that choose, from what their store knows of its keys."""
        pools = store.pools
        known = None if pools is None else partial(partial, pools.of)
        return self._site(heads)._replace(policy=policy, pools=known)

    def _fetch(self) -> Tensor:
        """Attention of one token of each row to what it reads of the host's keys: [b, h, 1, dv]."""
        store, heads = self.hosted, self.plan.hosted_queries
        assert store is not None
        site = self._asked(store, heads, self.plan.hosted_policy)
        query = heads.take(self.query)
        seen = torch.zeros(
            self.batch, len(heads), store.longest, dtype=torch.bool, device=query.device
        )
        for rows, span in self._groups(self._placement()):
            own, keys = slice(rows[0], rows[-1] + 1), span.key_stop
            # what the policy is asked by its pools; NaN for whoever looks at keys all the same
            nothing = self.key.new_full((1,), float("nan"))
            key = nothing.expand(len(rows), len(self.plan.hosted), keys, self.key.shape[3])
            layer = Layer(self.plan.index, pools=site.pools_of(own))
            mask, _ = self.listener._ask(site, "decode", layer, query[own], key, key)
            self._count(heads, mask, len(rows))
            seen[own, :, :keys] = mask.dense()[:, :, 0]
        key, value, own_mask = store.fetch(seen)
        return self._compute(heads, key, value, own_mask)

    def _recall(self) -> Tensor:
        """Attention under the choice of an earlier call: [b, h, 1, dv]."""
        assert self.whole is not None
        heads, mask = self.plan.whole_queries, self.whole.read()
        self._count(heads, mask, self.batch)
        return self._compute(heads, *self.whole.held(), mask)

    def _remember(self, groups: list[tuple[list[int], Span]], masks: list[Mask]) -> None:
        """Until when each key is read, where that is not asked again."""
        if not self.plan.remembers:
            return
        assert self.whole is not None
        for (rows, span), mask in zip(groups, masks, strict=True):
            keys = span.key_stop - span.key_start
            death = self._ends(mask, self.plan.whole_queries, len(rows), keys, keys)
            self.whole.remember(rows, death.flatten(1, 2))

    # kv heads that drop keys

    def _bunch(self, out: Tensor, row: int, heads: list[int], slots: Tensor) -> Part:
        """Attend with some heads of a row, whose live keys are in ``slots`` [g, c]."""
        ragged, run, seen = self.ragged, slice(*self.runs[row]), self.seen[row]
        assert ragged is not None
        new = torch.arange(self.before[row], seen, device=slots.device)
        old = ragged.positions[row][slots].long()
        positions = torch.cat([old, new.expand(len(heads), -1)], -1)[None]
        kv = Heads([self.plan.freed.numbers[head] for head in heads], self.key.shape[1])
        k, v = (
            torch.cat([kept[row][slots][None], kv.take(x[row : row + 1, :, run])], 2)
            for kept, x in ((ragged.keys, self.key), (ragged.values, self.value))
        )
        queries = self.plan.queries_of(kv)
        policy = self.plan.policy.of_heads(queries.numbers, seen, self.plan.index)
        site = self._site(queries)._replace(policy=policy)
        q = queries.take(self.query[row : row + 1, :, run])
        tell = partial(self.listener._hear, site, "prefill")
        layer = Layer(self.plan.index, tell=tell)
        mask, bias = self.listener._ask(site, "prefill", layer, q, k, v)
        self.listener._note(site, "prefill", q, mask, bias)
        part = self.listener._compute(site, q, k, v, mask, bias)
        queries.put(out[row : row + 1, :, run], part)
        self._count(queries, mask, 1)
        death = self._ends(mask, queries, 1, k.shape[2], seen)
        return Part([row], heads, positions, k, v, death, seen)

    # kv heads that evict by score

    def _scores(self) -> Tensor | None:
        """Scores of the new tokens' keys, of all kv heads [b, g, n]; None where nobody asks."""
        if not self.live:
            return None
        rows, new = slice(0, self.batch), slice(0, self.n)
        memo = self.site.where.memo
        unrotate = unrotate_of(self.site.module, self.site.call, rows, new, 0, memo)
        layer = Layer(self.plan.index, unrotate=unrotate)
        return self.plan.policy.score(self.key, self.value, layer)

    def _attend_live(self, out: Tensor | None, phase: str, scores: Tensor | None) -> None:
        """Attend with the heads that evict by score, and evict.

        Args:
            out: takes the results; None where all heads have attended, and keys are kept alone.
            phase: "prefill" or "decode".
            scores: of the new tokens' keys, of all kv heads.
        """
        for store, (heads, _) in zip(self.live, self.plan.live, strict=True):
            queries = self.plan.queries_of(heads)
            site = self._site(queries)

            def compute(q: Tensor, live: Live, first: int, site: Site = site) -> Tensor:
                if out is None:  # nobody reads it: a view that takes no memory
                    return q.new_zeros(1).expand(*q.shape[:3], live.value.shape[-1])
                assert site.heads is not None
                mask = self._guarded(site, phase, q, live)
                self._count(site.heads, mask, len(q))
                self.listener._note(site, phase, q, mask, None)
                return self.listener._compute(site, q, live.key, live.value, mask, None)

            assert scores is not None
            q, spans = queries.take(self.query), self.site.where.spans
            k, v, s = (heads.take(x) for x in (self.key, self.value, scores))
            part = store.attend(q, k, v, s, spans, compute=compute)
            if out is not None:
                queries.put(out, part)

    def _guarded(self, site: Site, phase: str, query: Tensor, live: Live) -> Mask:
        """What heads that evict by score read of live keys: more where a guard asks for it."""
        policy = self.plan.policy
        if policy.guard is None or query.shape[2] < GUARD_ROWS:
            return live.mask
        assert site.heads is not None
        site = site._replace(policy=policy.of_heads(site.heads.numbers, layer=self.plan.index))
        tell = partial(self.listener._hear, site, phase)
        layer = Layer(self.plan.index, tell=tell, scores=live.scores)
        return self.listener._ask(site, phase, layer, query, live.key, live.value)[0]

    # what all have in common

    def _out(self) -> Tensor:
        """Where the results of the heads go: [b, h, n, dv]; 0 for padding."""
        return self.query.new_zeros(self.batch, self.heads, self.n, self.value.shape[-1])

    def _site(self, heads: Heads) -> Site:
        """The site of some query heads."""
        s_aux = self.site.s_aux
        if s_aux is not None:
            s_aux = heads.take(s_aux[None])[0]
        return self.site._replace(s_aux=s_aux, heads=heads)

    def _compute(self, heads: Heads, key: Tensor, value: Tensor, mask: Mask | Plan) -> Tensor:
        """Attention of one token's query heads."""
        site, query = self._site(heads), heads.take(self.query)
        self.listener._note(site, "decode", query, mask, None)
        return self.listener._compute(site, query, key, value, mask, None)  # type: ignore[arg-type]

    def _count(self, heads: Heads, mask: Mask, rows: int) -> None:
        """Count what a mask lets through, where anybody listens."""

        def pairs() -> Tensor:
            found = mask.density() * mask.causal_pairs()
            return found.repeat_interleave(len(heads) // found.shape[1], 1).expand(rows, -1)

        self.kept.append((heads, pairs))

    def _report(self, phase: str) -> None:
        """Tell how many pairs each head read, of how many that causal attention reads."""

        def total() -> Tensor:
            kept = torch.zeros(self.heads, dtype=torch.float64, device=self.query.device)
            for heads, pairs in self.kept:
                kept[heads.numbers] += pairs().double().sum(0)
            return kept

        rows = [(self.before[row], stop - start) for row, (start, stop) in self.runs.items()]
        causal = sum(before * n + n * (n + 1) // 2 for before, n in rows)
        self.adapter._count(self.site, phase, total, causal)

    def _ends(self, mask: Mask, heads: Heads, rows: int, keys: int, seen: int) -> Tensor:
        """Position from which on each key is not read: int32 [rows, g, members, keys].

        Args:
            mask: what the policy answered, for these heads or for all.
            heads: query heads, whole groups of them.
            rows: batch rows.
            keys: keys of the call; the newest are the last.
            seen: tokens of each row, those of this call counted.
        """
        device, plan = self.key.device, self.plan
        windows, chooses = (plan.of_queries(name, heads, device) for name in ("windows", "chooses"))
        k = torch.arange(keys, device=device)
        death = (k + windows).clamp(max=INF).masked_fill(k < plan.policy.sinks, INF)
        if plan.keeps and self.held:  # the choice is still to come
            death = torch.where(chooses, INF, death)
        elif plan.keeps:
            death = _chosen(mask, heads, windows, death)
        death = (death + (seen - keys)).masked_fill(death == INF, INF).clamp(max=INF).int()
        return death.expand(rows, -1, -1).unflatten(1, (-1, plan.members))


def _chosen(mask: Mask, heads: Heads, windows: Tensor, own: Tensor) -> Tensor:
    """Ends of keys as the policy answered: int64 [b or 1, h, keys]; ``own`` by windows alone."""
    if isinstance(mask, MixedMask):  # maps that choose anew are not asked about
        mask = mask.parts[0]
    if not isinstance(mask, LifetimeMask):
        raise bad(
            "GatedCache", "lifetimes, which decode='keep' remembers", type(mask).__name__,
            "Use decode='full'.",
        )  # fmt: skip
    if mask.plain:  # all keys are in the windows, or the guard has made every map dense
        return torch.where(windows >= mask.keys, own, INF)
    death = mask.death.long()
    return death if death.shape[1] == len(heads) else heads.take(death)


def _alike(order: Tensor, counts: list[int]) -> list[tuple[list[int], Tensor]]:
    """Heads that hold equally many keys of a row, and the slots of these keys [heads, keys]."""
    groups: dict[int, list[tuple[int, Tensor]]] = {}
    first = 0
    for head, count in enumerate(counts):
        groups.setdefault(count, []).append((head, order[first : first + count]))
        first += count
    return [
        ([head for head, _ in group], torch.stack([slots for _, slots in group]))
        for group in groups.values()
    ]


__all__ = ["GatedCall", "attend"]
