"""BoundedCache: a transformers cache that keeps only the keys which are still read."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from ..cache import KeyStore
from ..errors import bad
from ..policies.base import evicts
from ..retention import Retention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .placement import Placement
    from .transformers import Run


class NewKeysLayer(CacheLayerMixin):
    """One layer of a cache that counts tokens and hands new keys through.

    The attention function puts them in the store, for only it knows which are padding.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = False

    def __init__(self, owner: OwnedCache) -> None:
        super().__init__()
        self.store: Any = None
        self.tokens = 0
        self._check = owner.check_in_effect
        self._kind = type(owner).__name__
        self._waiting = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the store makes its slots when it sees the first keys."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Count the new tokens and return them alone."""
        self._check()
        if self._waiting:
            raise ValueError(
                f"{self._kind}: expected the model that it was made for, received keys of one "
                "whose attention is not dynmask's; use the cache with that model only, and "
                "reset() it after an error"
            )
        self._waiting = True
        self.tokens += key_states.shape[-2]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The mask is about the new tokens alone."""
        return query_length, self.tokens

    def get_seq_length(self) -> int:
        """Tokens seen, padding counted."""
        return self.tokens

    def get_max_length(self) -> int:
        """Without end."""
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget everything."""
        self.store, self.tokens, self._waiting = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of beams."""
        if self.store is not None:
            self.store.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row several times."""
        if self.store is not None:
            self.store.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some rows alone."""
        if self.store is not None:
            self.store.reorder(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, given as a negative number."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop: expected minus the number of tokens to forget, received {tokens_to_remove}"
            )
        if self.store is not None:
            self.store.crop(-tokens_to_remove)
            self.tokens = max(self.tokens + tokens_to_remove, 0)


class BoundedLayer(NewKeysLayer):
    """One layer of a :class:`BoundedCache`."""

    store: KeyStore | None

    def arrived(self, retention: Retention, limit: int | None) -> KeyStore:
        """The store, for the keys of the last update."""
        self._waiting = False
        if self.store is None:
            self.store = KeyStore(retention, limit)
        if self.store.retention != retention:
            raise ValueError(
                f"BoundedCache: expected {self.store.retention} as when it was filled, received a "
                f"layer with {retention}; make a new cache after a change of the width"
            )
        return self.store


class OwnedCache(Cache):
    """A cache for one model under one run (or conversion), refused everywhere else."""

    def _own(self, owner: Any, modules: Iterable[nn.Module]) -> None:
        """Remember whose cache it is."""
        # weak references: a copy of the cache is no copy of the model
        self._owner = weakref.ref(owner)
        self._modules = {id(m): weakref.ref(m) for m in modules}

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' tensors: of layers with transformers' own cache keys and values."""
        return sum(_layer_bytes(layer) for layer in self.layers)

    def check_in_effect(self) -> None:
        """Raise ValueError where the policy that the cache was made for is gone."""
        from .convert import is_converted

        owner: Any = self._owner()
        gone = owner is None or (
            owner.removed if hasattr(owner, "removed") else not is_converted(owner)
        )
        if gone:
            raise ValueError(
                f"{type(self).__name__}: expected the run that it was made for to be in effect, "
                "received a call after it was removed (or its model reverted); make a new cache "
                "for a new run"
            )

    def _check_layer(self, module: nn.Module, linear: bool) -> None:
        """Raise ValueError for a layer of another model, or a mask that is not about tokens."""
        known = self._modules.get(id(module))
        if known is None or known() is not module:
            raise ValueError(
                f"{type(self).__name__}: expected the model that it was made for, received a layer "
                "of another; make one cache for each model"
            )
        if not linear:
            raise ValueError(
                "attention_mask: expected a 2-D mask of all tokens so far, or none, received "
                f"another with a {type(self).__name__}; pass the tokenizer's attention_mask"
            )


def _layer_bytes(layer: Any) -> int:
    """Bytes of a layer of whatever kind."""
    if isinstance(layer, NewKeysLayer):
        return 0 if layer.store is None else layer.store.nbytes
    held = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(x.nbytes for x in held if isinstance(x, Tensor))


def check_rows(where: Placement, seen: Sequence[int]) -> None:
    """Raise ValueError unless new tokens follow those that each batch row has seen."""
    for span, first in zip(where.spans, where.first_keys, strict=True):
        if span.batch >= len(seen) or seen[span.batch] != first:
            raise ValueError(
                "attention_mask: expected one that hides the same tokens as before, and as "
                f"many batch rows, received position {first} for a new token of row "
                f"{span.batch} after {seen[span.batch] if span.batch < len(seen) else 0} "
                "tokens; pad on the left, and append ones for new tokens"
            )


class BoundedCache(OwnedCache):
    """Per layer and kv head only the keys that are still read: O(width) memory at any length.

    For a model sparsified by a policy that evicts (``Streaming``, ``Retained``), or a converted
    one::

        with dynmask.sparsify(model, policy) as run:
            model.generate(**inputs, past_key_values=dynmask.BoundedCache(run))

    Outputs are those of the same policy over a full cache. With ``prefill_chunk_size=4096`` the
    memory of a prompt is that of the kept keys and one chunk. Batches padded on the left, beam
    search, sampling and continuing a conversation work. Layers with a sliding window of their
    own keep that window. What it cannot do: packed rows, masks other than the 2-D one, and
    going back (assisted generation), for evicted keys are gone. A ``copy.deepcopy`` is a fork.

    Args:
        run: what ``sparsify`` returned, or a model that ``convert`` changed.

    Raises:
        ValueError: a run whose policy does not evict, or was removed, or measures kept mass; a
            model that is not converted; or a layer without attention.
    """

    def __init__(self, run: Run | PreTrainedModel) -> None:
        from .checks import attention_modules, decoder_config
        from .convert import is_converted

        model: Any = getattr(run, "model", run) if hasattr(run, "removed") else run
        if model is run:
            if not isinstance(run, nn.Module) or not is_converted(run):
                raise ValueError(
                    "BoundedCache: expected the run that sparsify returned or a converted model, "
                    f"received {type(run).__name__}; see dynmask.sparsify and dynmask.convert"
                )
        else:
            _check_run(run)
        modules = attention_modules(model)
        layers = decoder_config(model).num_hidden_layers
        if sorted({int(m.layer_idx) for m in modules}) != list(range(layers)):  # type: ignore[arg-type]
            raise ValueError(
                f"BoundedCache: expected attention in each of {layers} layers, received "
                f"{len(modules)} attention modules; hybrid models keep their own cache"
            )
        layers_of("BoundedCache", model.config)
        self._own(run, modules)
        super().__init__(layers=[BoundedLayer(self) for _ in range(layers)])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, given as a negative number; all layers or none."""
        for layer in self.layers:
            if layer.store is not None and tokens_to_remove < 0:  # type: ignore[union-attr]
                layer.store.check_crop()  # type: ignore[union-attr]
        super().crop(tokens_to_remove)

    def store(
        self,
        module: nn.Module,
        index: int,
        policy: Any,
        where: Placement,
        linear: bool,
        batch: int,
    ) -> KeyStore:
        """The store of one layer, checked against where the new tokens lie."""
        self._check_layer(module, linear)
        retention, limit = policy.retention(index), where.window
        if limit is not None and retention.most > retention.sinks + retention.window:
            retention = Retention(limit, limit, 0)
        store = self.layers[index].arrived(retention, limit)  # type: ignore[union-attr]
        check_rows(where, store.seen or [0] * batch)
        return store


def layers_of(name: str, config: Any, remedy: str = "Hybrid models keep their own cache.") -> list:
    """The layers of transformers' own cache for a model; ValueError where one is no such."""
    layers: list[Any] = DynamicCache(config=config).layers
    others = {type(x) for x in layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    if others:
        first = sorted(kind.__name__ for kind in others)[0]
        expected = "layers that hold keys of their own and nothing else"
        raise bad(name, expected, first, remedy)
    return layers


def check_run(name: str, run: Any) -> None:
    """Raise ValueError unless a cache of this name is given a run that is in effect."""
    if not hasattr(run, "removed"):
        raise bad(
            name, "the run that sparsify returned", type(run).__name__, "See dynmask.sparsify."
        )
    if run.removed:
        raise bad(name, "a run in effect", "one that was removed", "Call dynmask.sparsify again.")


def _check_run(run: Any) -> None:
    check_run("BoundedCache", run)
    policy = run.policy
    if not evicts(policy) or policy.phase != "both":
        raise ValueError(
            "BoundedCache: expected a policy that only ever evicts (Streaming, Retained), received "
            f"{policy.name}, which may ask for any key again; gated policies have "
            "dynmask.GatedCache, h2o has dynmask.HeavyHitterCache, others the cache of generate()"
        )
    if run.measures_mass:
        raise ValueError(
            "BoundedCache: expected measure_rows=0, received more; the true attention of keys that "
            "were evicted is not known: measure with the cache of generate()"
        )


__all__ = [
    "BoundedCache", "BoundedLayer", "NewKeysLayer", "OwnedCache", "check_rows", "check_run",
    "layers_of",
]  # fmt: skip
