"""GatedCache: a transformers cache that drops the keys which a gated policy never reads again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..cache import KeyStore
from ..errors import bad
from ..hosted import HostedStore
from ..masks import LifetimeMask
from ..masks.base import check_whole
from ..policies import Gated
from ..pooled_keys import PooledKeys
from ..ragged import RaggedStore, WholeStore
from ..retention import ExactRetention, Retention
from .cache import NewKeysLayer, OwnedCache, check_rows, check_run, layers_of

if TYPE_CHECKING:
    from torch import nn

    from .placement import Placement
    from .transformers import Run


class Heads:
    """Some of the heads in dimension 1 of a tensor."""

    def __init__(self, numbers: Sequence[int], of: int) -> None:
        self.numbers = list(numbers)
        self.of = of
        first, last = (self.numbers[0], self.numbers[-1]) if self.numbers else (0, -1)
        self.run = slice(first, last + 1) if last - first + 1 == len(self.numbers) else None
        self.all = len(self.numbers) == of
        self._index: dict[torch.device, Tensor] = {}

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, x: Tensor) -> Tensor:
        """These heads of ``x``: a view where they lie side by side."""
        return x if self.all else x[:, self._at(x.device)]

    def put(self, out: Tensor, x: Tensor) -> None:
        """Write ``x`` to these heads of ``out``."""
        out[:, self._at(out.device)] = x.to(out.dtype)

    def _at(self, device: torch.device) -> Any:
        if self.run is not None:
            return self.run
        if device not in self._index:
            self._index[device] = torch.tensor(self.numbers, device=device)
        return self._index[device]


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """Which heads of a layer drop keys, and by what rules.

    Attributes:
        index: number of the layer.
        policy: asked about all heads.
        members: query heads of a kv head.
        windows: of each query head; ``LifetimeMask.INF`` where it is dense.
        chooses: which query heads choose columns.
        freed, whole, hosted: kv heads that drop keys, those that keep all, and those that keep all
            on the host.
        live: kv heads that evict by their scores, those that keep equally much together, and how
            much that is.
        freed_queries, whole_queries, hosted_queries: their query heads.
        whole_policy, hosted_policy: asked about the query heads of ``whole`` and ``hosted``.
        keeps: what a call of many tokens chose is read by those of one token that follow.
        anew: whether some map of the layer chooses blocks or diagonals, or one of ``whole`` keeps
            by score: then the kv heads of ``whole``, which keep all keys, choose for every token.
    """

    index: int
    policy: Gated
    members: int
    windows: tuple[int, ...]
    chooses: tuple[bool, ...]
    freed: Heads
    whole: Heads
    hosted: Heads
    live: tuple[tuple[Heads, Retention], ...]
    freed_queries: Heads
    whole_queries: Heads
    hosted_queries: Heads
    whole_policy: Gated
    hosted_policy: Gated
    keeps: bool
    anew: bool
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls, policy: Gated, index: int, heads: int, kv_heads: int, offload: bool = False
    ) -> LayerPlan:
        """The plan of a layer of so many heads."""
        members = heads // kv_heads
        free = policy.frees(index, heads, kv_heads)
        away = policy.reads_blocks(index, heads, kv_heads) if offload else [False] * kv_heads
        lives = policy.lives(index, heads, kv_heads)
        kinds = [
            0 if free[g] else 2 if away[g] else 1 if lives[g] is None else 3
            for g in range(kv_heads)
        ]
        budgets = sorted({own for own in lives if own is not None})

        freed, whole, hosted = (
            Heads([g for g in range(kv_heads) if kinds[g] == kind], kv_heads) for kind in range(3)
        )
        freed_queries, whole_queries, hosted_queries = (
            _queries(some, members) for some in (freed, whole, hosted)
        )
        asked = policy.choosing()
        whole_policy = asked.of_heads(whole_queries.numbers, layer=index)
        return cls(
            index=index,
            policy=asked,
            members=members,
            windows=tuple(policy.windows(index, heads)),
            chooses=tuple(policy.chooses(index, heads)),
            freed=freed,
            whole=whole,
            hosted=hosted,
            live=tuple(
                (
                    Heads([g for g in range(kv_heads) if lives[g] == own], kv_heads),
                    _retention(policy.sinks, *own),
                )
                for own in budgets
            ),
            freed_queries=freed_queries,
            whole_queries=whole_queries,
            hosted_queries=hosted_queries,
            whole_policy=whole_policy,
            hosted_policy=asked.of_heads(hosted_queries.numbers, layer=index),
            keeps=policy.decode == "keep",
            anew=any(policy.chooses_anew(index, heads)) or whole_policy.keeps(index),
        )

    def __deepcopy__(self, memo: Any) -> LayerPlan:
        return self  # nothing changes it

    @property
    def remembers(self) -> bool:
        """Whether the kv heads that keep all keys have maps that do not read all."""
        finite = any(self.windows[h] < LifetimeMask.INF for h in self.whole_queries.numbers)
        return self.keeps and finite and not self.anew

    def pools(self, kv: Heads) -> PooledKeys | None:
        """Summaries for those of some kv heads that have a map that chooses blocks; None if none.

        An encoder looks at whole blocks besides.
        """
        asked, m = self.policy, self.members
        chooses = asked.chooses_blocks(self.index, kv.of * m)
        some = [i for i, g in enumerate(kv.numbers) if any(chooses[g * m : (g + 1) * m])]
        trained = asked.encoders is not None and asked.encoders[self.index] is not None
        sizes = {asked.key_pool, asked.block} if trained else {asked.key_pool}
        return PooledKeys(some, sorted(sizes)) if some else None

    def store(self, prompt: int = 0) -> LayerStore:
        """An empty one, of sequences whose prompts have so many tokens where that is known."""
        ragged = whole = hosted = None
        if len(self.freed):
            own = [self.windows[h] for h in self.freed_queries.numbers]
            m = self.members
            grouped = [own[i : i + m] for i in range(0, len(own), m)]
            ragged = RaggedStore(grouped, self.policy.sinks)
        if len(self.whole):
            own = [self.windows[h] for h in self.whole_queries.numbers]
            own = own if self.remembers else None
            whole = WholeStore(own, self.policy.sinks, self.pools(self.whole))
        pools = self.pools(self.hosted)
        if pools is not None:
            hosted = HostedStore(pools, self.policy.block, prompt)
        live = tuple(KeyStore(retention) for _, retention in self.live)
        return LayerStore(ragged, whole, hosted, live)

    def queries_of(self, kv: Heads) -> Heads:
        """The query heads of some kv heads."""
        return _queries(kv, self.members)

    def of_queries(self, name: str, heads: Heads, device: torch.device) -> Tensor:
        """``windows`` (int64) or ``chooses`` (bool) of some query heads: [h, 1], copied once."""
        at = name, tuple(heads.numbers), device
        if at not in self.memo:
            values = getattr(self, name)
            self.memo[at] = torch.tensor([[values[h]] for h in heads.numbers], device=device)
        return self.memo[at]


def _retention(sinks: int, window: int, kept: int) -> Retention:
    """What a query reads that keeps so many keys beside sinks and window."""
    return ExactRetention(sinks + window + kept, window, sinks)  # scores are rounded already


def _queries(kv: Heads, members: int) -> Heads:
    """The query heads of some kv heads."""
    return Heads([g * members + m for g in kv.numbers for m in range(members)], kv.of * members)


@dataclass
class LayerStore:
    """What a layer keeps of its kv heads.

    Attributes:
        ragged: those that drop keys.
        whole, hosted: those that do not, and those that do not but on the host.
        live: those that evict by score, a store for all that keep equally much, so that none has a
            slot more than it fills.
    """

    ragged: RaggedStore | None
    whole: WholeStore | None
    hosted: HostedStore | None = None
    live: tuple[KeyStore, ...] = ()

    @property
    def seen(self) -> list[int]:
        """Tokens of each batch row; empty before the first call."""
        return self._stores()[0].seen

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are not on the host."""
        return sum(store.nbytes for store in self._stores())

    @property
    def host_nbytes(self) -> int:
        """Bytes of all tensors on the host."""
        return 0 if self.hosted is None else self.hosted.host_nbytes

    def check_fit(self, plan: LayerPlan, key: Tensor, value: Tensor) -> None:
        """Raise ValueError unless new keys [b, g, n, d] and values are of the kind of the old.

        Stores of live heads look for themselves, before they change.
        """
        if self.seen:
            for store, heads in (
                (self.ragged, plan.freed),
                (self.whole, plan.whole),
                (self.hosted, plan.hosted),
            ):
                if store is not None:
                    store.check_fit(heads.take(key), heads.take(value))

    def reorder(self, index: Tensor | Sequence[int]) -> None:
        """Batch row i becomes what row ``index[i]`` was."""
        for store in self._stores():
            store.reorder(index)

    def repeat(self, times: int) -> None:
        """Each batch row several times."""
        for store in self._stores():
            store.repeat(times)

    def check_crop(self) -> None:
        """Raise ValueError where keys were dropped that an earlier state would need."""
        for store in (self.ragged, *self.live):
            if store is not None:
                store.check_crop()

    def crop(self, tokens: int) -> None:
        """Forget the newest tokens; ValueError where keys were dropped."""
        for store in self._stores():
            store.crop(tokens)

    def _stores(self) -> list[RaggedStore | WholeStore | HostedStore | KeyStore]:
        every = self.ragged, self.whole, self.hosted, *self.live
        return [store for store in every if store is not None]


class GatedLayer(NewKeysLayer):
    """One layer of a :class:`GatedCache`."""

    store: LayerStore | None

    def __init__(self, owner: GatedCache, plan: LayerPlan, prompt: int) -> None:
        super().__init__(owner)
        self.plan = plan
        self.prompt = prompt

    def arrived(self) -> LayerStore:
        """The store, for the keys of the last update."""
        self._waiting = False
        if self.store is None:
            self.store = self.plan.store(self.prompt)
        return self.store

    def in_prompt(self, tokens: int) -> bool:
        """Whether so many tokens are less than the prompt that was announced."""
        return tokens < self.prompt


class GatedCache(OwnedCache):
    """Per layer and kv head only the keys that a gated policy reads again.

    For a model sparsified by ``Gated``::

        with dynmask.sparsify(model, policy) as run:
            model.generate(**inputs, past_key_values=dynmask.GatedCache(run))

    A kv head drops keys where all query heads of its group have a window and no columns, or,
    under ``decode="keep"``, a window. It then holds sinks, the columns of its query heads and the
    widest of their windows; each query head still reads its own. Where all query heads of a group
    keep equally many keys by score, beside the same window, it holds what they read and evicts with
    each token, in chunks of a prompt too. Other kv heads keep all keys. Outputs are those of the
    same policy, and the same choice of columns, over all keys.

    A call of several tokens ends with a choice: its last queries choose the columns, from what is
    still there, that are read until the next such call. So a second turn chooses anew, and a
    prompt that comes in chunks loses with every chunk what its last queries did not look at. Say
    how long such a prompt is, and nothing that could be a column is dropped before its end::

        cache = dynmask.GatedCache(run, prompt=inputs["input_ids"].shape[1])
        model.generate(**inputs, past_key_values=cache, prefill_chunk_size=4096)

    Batches padded on the left, beam search, sampling and continuing a conversation work. Layers
    with a sliding window of their own have transformers' cache and choose anew for every token.
    Forgetting tokens (``crop``) works until the first key was dropped. A ``copy.deepcopy`` is a
    fork. The guard of a policy looks at what is still there; kept mass is measured in the call
    that begins a sequence.

    Maps that choose blocks do so from pools of the keys, which the cache carries along: a decoded
    token or a chunk pools its own keys alone.

    With ``offload`` the keys and values of kv heads that read nothing but blocks and windows lie in
    host memory (pinned, and copied on a stream of its own, where there is CUDA). Their pools stay
    on the device, and of a decoded token the blocks that it reads are copied. A call of several
    tokens reads nearly all blocks: it has all keys of one layer copied, one layer at a time.

    Args:
        run: what ``sparsify`` returned.
        prompt: tokens of a prompt that comes in chunks, padding counted.
        offload: keep on the host what is rarely read.

    Raises:
        ValueError: a run whose policy is not gated, or was removed, or reads all keys for every
            token; ``offload`` where no kv head reads blocks and windows alone.
    """

    def __init__(self, run: Run, prompt: int = 0, offload: bool = False) -> None:
        from .checks import attention_modules, decoder_config

        policy = _policy_of(run)
        check_whole("prompt", prompt, 0)
        if not isinstance(offload, bool):
            raise bad("GatedCache: offload", "True or False", repr(offload))
        config = decoder_config(run.model)
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        heads, kv_heads = heads // run.shard[1], kv_heads // run.shard[1]
        layers = layers_of("GatedCache", run.model.config)
        plans = {
            index: LayerPlan.of(policy, index, heads, kv_heads, offload)
            for index, layer in enumerate(layers)
            if type(layer) is DynamicLayer
        }
        _check_gains(policy, list(plans.values()), heads, offload)
        self._own(run, attention_modules(run.model))
        self.policy = policy.choosing()
        for index, plan in plans.items():
            layers[index] = GatedLayer(self, plan, prompt)
        super().__init__(layers=layers)

    @property
    def host_nbytes(self) -> int:
        """Bytes of all layers' tensors that were moved to the host; 0 without ``offload``."""
        stores = [x.store for x in self.layers if isinstance(x, GatedLayer)]
        return sum(store.host_nbytes for store in stores if store is not None)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, given as a negative number; all layers or none."""
        for layer in self.layers:
            store = layer.store if isinstance(layer, GatedLayer) else None
            if store is not None and tokens_to_remove:
                store.check_crop()
        super().crop(tokens_to_remove)

    def arrived(
        self,
        module: nn.Module,
        layer: GatedLayer,
        where: Placement,
        linear: bool,
        key: Tensor,
        value: Tensor,
    ) -> LayerStore:
        """The store of one layer, checked against the new tokens and where they lie."""
        self._check_layer(module, linear)
        if where.window is not None:
            raise bad(
                "GatedCache",
                "a sliding window in the model's configuration",
                f"one of {where.window} keys in layer {layer.plan.index} alone",
                "Leave the cache to generate().",
            )
        if key.shape[1] != layer.plan.freed.of:
            raise bad(
                "GatedCache", f"{layer.plan.freed.of} kv heads, as when it was made", key.shape[1],
                "Make the cache after dynmask.distributed.share_heads.",
            )  # fmt: skip
        store = layer.arrived()
        check_rows(where, store.seen or [0] * len(key))
        store.check_fit(layer.plan, key, value)
        return store


def _check_gains(policy: Gated, plans: list[LayerPlan], heads: int, offload: bool) -> None:
    """Raise ValueError for a policy that this cache has nothing to offer."""
    if policy.decode == "full":
        raise bad(
            "GatedCache", "a policy that leaves keys unread while tokens are decoded",
            "decode='full', which reads them all",
            "Use decode='keep' or 'select', or leave this cache and its offload out.",
        )  # fmt: skip
    if offload and not any(len(plan.hosted) for plan in plans):
        raise bad(
            "GatedCache: offload",
            "a kv head whose maps all choose blocks, or have a window beside one that does",
            "none: dense maps, and columns that are chosen anew, read every key for each token",
            "Leave offload out.",
        )
    blocks = any(any(policy.chooses_blocks(plan.index, heads)) for plan in plans)
    freed = any(len(plan.freed) or plan.live for plan in plans)
    if policy.decode != "keep" and not freed and not blocks:
        raise bad(
            "GatedCache",
            "a kv head whose maps all have a window and no columns, keep by one score alike, or "
            "choose blocks",
            f"none under decode={policy.decode!r}: any key may be read again"
            if plans
            else "a model whose layers all have sliding windows of their own",
            "Use decode='keep' (which has no dense_up_to), or leave the cache to generate().",
        )


def _policy_of(run: Any) -> Gated:
    """The policy of a run in effect."""
    check_run("GatedCache", run)
    if not isinstance(run.policy, Gated):
        raise bad(
            "GatedCache",
            "a gated policy",
            f"{run.policy.name}",
            "Policies that only evict have dynmask.BoundedCache, h2o has dynmask.HeavyHitterCache; "
            "leave the cache of others to generate().",
        )
    return run.policy


__all__ = ["GatedCache", "GatedLayer", "Heads", "LayerPlan", "LayerStore"]
