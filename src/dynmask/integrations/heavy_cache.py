"""HeavyHitterCache: a transformers cache of the keys that have received the most attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..cache import Live, gather_keys, runs_of
from ..errors import bad
from ..masks import LifetimeMask
from ..policies import H2O
from ..policies.h2o import NO_KEY
from ..slots import EMPTY, Rows
from .cache import NewKeysLayer, OwnedCache, check_rows, check_run, layers_of

if TYPE_CHECKING:
    from .adapter import Adapter, Site
    from .transformers import Run

STATE = ("keys", "values", "positions", "received")
"""What is held of each key."""


class HeavyHitterStore(Rows):
    """One layer's keys that are held, with the attention that each has received.

    ``positions`` int32 and ``received`` float32 are [b, g, slots]. All rows have as many slots as
    the fullest, at most ``width``; a row that holds fewer keys has empty ones. Keys and values
    are stored without their gradients.

    Args:
        policy: what evicts.
    """

    def __init__(self, policy: H2O) -> None:
        self.policy = policy
        super().__init__()

    @property
    def positions(self) -> Tensor:
        """int32 [b, g, slots], position of each key in its sequence; -1 in empty slots."""
        return self._tensors["positions"]

    @property
    def received(self) -> Tensor:
        """float32 [b, g, slots]."""
        return self._tensors["received"]

    def reset(self) -> None:
        """Forget every key, the batch size too."""
        super().reset()
        self.even = True
        """Whether all rows hold equally many keys, as they do until some go on alone."""

    def start(self, batch: int, key: Tensor, value: Tensor) -> None:
        """Nothing is held yet; later keys [b, g, n, d] and values must fit the first."""
        if self._tensors:
            self.check_fit(key, value)
            return
        size = batch, key.shape[1], 0
        self.seen = [0] * batch
        with torch.inference_mode(False):
            self._tensors = {
                "keys": key.new_zeros(*size, key.shape[3], requires_grad=False),
                "values": value.new_zeros(*size, value.shape[3], requires_grad=False),
                "positions": torch.zeros(size, dtype=torch.int32, device=key.device),
                "received": torch.zeros(size, device=key.device),
            }

    def extend(
        self, query: Tensor, key: Tensor, value: Tensor, rows: Sequence[int] | None = None
    ) -> Live:
        """Let new tokens in; returns what their queries read.

        One token after others is a decoded one.

        Args:
            query: [b, h, n, d], of the given rows.
            key: [b, g, n, d].
            value: [b, g, n, dv].
            rows: batch rows of the store; all when None. They have seen equally many tokens, or
                each of them some where ``n`` is 1.
        """
        n, device = key.shape[2], key.device
        every = range(self.batch) if rows is None else rows
        seen = [self.seen[row] for row in every]
        decoding = n == 1 and any(seen)
        held = None if any(seen) else 0  # slots that others have filled are none of theirs
        keys, values, positions, received = (self._of(name, rows)[:, :, :held] for name in STATE)
        keys, values = _joined(keys, key), _joined(values, value)
        with torch.inference_mode(False), torch.no_grad():
            # what all have seen is a number, which need not be copied to the device
            same = len(set(seen)) == 1
            before = seen[0] if same else torch.tensor(seen, device=device)[:, None, None]
            where = (positions.long() - before).masked_fill(positions < 0, NO_KEY)
            new = (torch.arange(n, device=device) + before).expand(*key.shape[:2], n)
            positions = torch.cat([positions, new.int()], -1)
            k, v = keys.detach(), values.detach()
            found = self.policy.follow(query.detach(), k, where, received, seen[0], decoding)
            state = {
                "keys": gather_keys(k, found.held),
                "values": gather_keys(v, found.held),
                "positions": positions.gather(-1, found.held),
                "received": found.received,
            }
            self._put(state, rows)
        for row in every:
            self.seen[row] += n
        if not decoding:
            most = min(self.policy.width, keys.shape[2])
            mask = LifetimeMask(found.death, n, most=most)
            return Live(keys, values, received, mask, positions)
        # a single query reads what is left: all of it, so that nothing is masked
        k, v, positions, received = (state[name] for name in STATE)
        mask = LifetimeMask.causal(k.shape[2], 1, device=device)
        if not self.even:
            death = torch.where(positions < 0, 0, LifetimeMask.INF).int()
            mask = LifetimeMask(death, 1, most=k.shape[2])
        return Live(k, v, received, mask, positions)

    def crop(self, tokens: int) -> None:
        """Refuse to forget tokens."""
        check_crop(tokens)

    def _of(self, name: str, rows: Sequence[int] | None) -> Tensor:
        """A tensor of some batch rows."""
        x = self._tensors[name]
        return x if rows is None else x[torch.tensor(rows, device=x.device)]

    def _put(self, state: dict[str, Tensor], rows: Sequence[int] | None) -> None:
        """Hold this of some batch rows, in place of what they held."""
        if rows is None:
            self._tensors = state
            return
        self.even = False
        at = torch.tensor(rows, device=state["keys"].device)
        slots = max(self.positions.shape[-1], state["positions"].shape[-1])
        for name, x in state.items():
            old, fill = self._tensors[name], EMPTY if name == "positions" else 0
            whole = old.new_full((*old.shape[:2], slots, *old.shape[3:]), fill)
            whole[:, :, : old.shape[2]] = old
            whole[at] = fill
            whole[at, :, : x.shape[2]] = x
            self._tensors[name] = whole


def check_crop(tokens: int) -> None:
    """Refuse to forget tokens: the attention that they gave is in the sums."""
    if tokens:
        raise bad(
            "HeavyHitterCache: crop", "no tokens to forget", abs(tokens),
            "What keys received from them, and lost, cannot be undone: keep a copy.deepcopy of "
            "the cache from before, or run the prompt again. Leave assisted decoding out.",
        )  # fmt: skip


def _joined(old: Tensor, new: Tensor) -> Tensor:
    """Keys or values that are held, then new ones."""
    return torch.cat([old, new], 2) if old.shape[2] else new


class HeavyHitterLayer(NewKeysLayer):
    """One layer of a :class:`HeavyHitterCache`."""

    store: HeavyHitterStore | None

    def arrived(self, policy: H2O) -> HeavyHitterStore:
        """The store, for the keys of the last update."""
        self._waiting = False
        if self.store is None:
            self.store = HeavyHitterStore(policy)
        return self.store


class HeavyHitterCache(OwnedCache):
    """Per layer, batch row and kv head the ``width`` keys that H2O keeps: O(width) memory.

    For a model sparsified by ``H2O``::

        with dynmask.sparsify(model, H2O(width=512)) as run:
            model.generate(**inputs, past_key_values=dynmask.HeavyHitterCache(run))

    It holds keys, values, positions and the attention that each key has received, which is what
    the policy goes on with: a prompt may come in chunks, cut anywhere, without reading otherwise
    than whole, and decoded tokens evict as well, one key each. A call of one token after others
    is a decoded token, one of several a part of a prompt (a chunk, a turn).

    Batches padded on the left, beam search, sampling and continuing a conversation work; a
    ``copy.deepcopy`` is a fork. Layers with a sliding window of their own have transformers' cache
    and read as without this one: what the policy chooses in a prompt, all of the window for a
    decoded token. Forgetting tokens (``crop``, assisted decoding) is refused. Kept mass is measured
    in the call that begins a sequence: the true attention of keys that were evicted is not known.

    Args:
        run: what ``sparsify`` returned.

    Raises:
        ValueError: a run whose policy is another, or was removed; or a layer without attention.
    """

    def __init__(self, run: Run) -> None:
        from .checks import attention_modules

        _check_run(run)
        remedy = "Hybrid models keep their own cache: H2O serves their prompts alone."
        layers = layers_of("HeavyHitterCache", run.model.config, remedy)
        self._own(run, attention_modules(run.model))
        super().__init__(
            layers=[HeavyHitterLayer(self) if type(x) is DynamicLayer else x for x in layers]
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Refused, in all layers, unless nothing is to be forgotten."""
        check_crop(tokens_to_remove)


def _check_run(run: Any) -> None:
    check_run("HeavyHitterCache", run)
    if not isinstance(run.policy, H2O):
        raise bad(
            "HeavyHitterCache", "the policy h2o", run.policy.name,
            "Policies that only evict have dynmask.BoundedCache, gated ones dynmask.GatedCache.",
        )  # fmt: skip


def attend(
    adapter: Adapter, site: Site, linear: bool, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Attend over what the cache holds and the new tokens, as far as they are held.

    Args:
        adapter: of the run.
        site: which layer is called; its placement is about the new tokens.
        linear: whether the mask is one of tokens.
        query: [b, h, n, d].
        key: [b, g, n, d], of the new tokens.
        value: [b, g, n, dv].

    Returns:
        [b, h, n, dv].
    """
    cache: HeavyHitterCache = site.call.cache
    layer = cache.layers[site.index]
    if not isinstance(layer, HeavyHitterLayer):  # a sliding window of its own
        return adapter._place(site, query, key, value)
    cache._check_layer(site.module, linear)
    where, (batch, _, n, _) = site.where, query.shape
    if where.window is not None:
        raise bad(
            "HeavyHitterCache", "a sliding window in the model's configuration",
            f"one of {where.window} keys in layer {site.index} alone",
            "Leave the cache to generate().",
        )  # fmt: skip
    store = layer.arrived(site.policy)
    check_rows(where, store.seen or [0] * batch)
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    runs = runs_of(where.spans, batch, n)
    if not runs:
        return out
    store.start(batch, key, value)

    # decoded tokens go on together, whatever was before them; others with their like
    decoding = n == 1 and min(store.seen) > 0
    groups: dict[tuple[int, int, int], list[int]] = {}
    for row, run in runs.items():
        groups.setdefault((0 if decoding else store.seen[row], *run), []).append(row)
    for (_, first, stop), rows in groups.items():
        if len(rows) == batch:
            q, k, v = (x[:, :, first:stop] for x in (query, key, value))
            out[:, :, first:stop] = _part(adapter, site, store, q, k, v, None).to(out.dtype)
            continue
        at = torch.tensor(rows, device=query.device)
        q, k, v = (x[at, :, first:stop] for x in (query, key, value))
        out[at, :, first:stop] = _part(adapter, site, store, q, k, v, rows).to(out.dtype)
    return out


def _part(
    adapter: Adapter,
    site: Site,
    store: HeavyHitterStore,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: list[int] | None,
) -> Tensor:
    """Attention of batch rows that go on together, all when None: [b, h, n, dv]."""
    every = range(store.batch) if rows is None else rows
    seen = max(store.seen[row] for row in every)
    live = store.extend(query, key, value, rows)
    if seen:
        phase = "decode" if query.shape[2] == 1 else "prefill"
        own = [store.seen[row] for row in every]
        adapter._measure_live(site, phase, query, live, seen, own)
    else:
        phase = "prefill"
        adapter._measure(site, phase, live.mask, 0, query, live.key)
    adapter._note(site, phase, query, live.mask, None)
    return adapter._compute(site, query, live.key, live.value, live.mask, None)


__all__ = ["HeavyHitterCache", "HeavyHitterLayer", "HeavyHitterStore", "attend"]
