"""Sparse attention in transformers models: one adapter for every architecture.

A policy is attached by registering one function in transformers' attention interface and one in
its mask interface, and naming both in the model's configuration; no modeling code is copied or
patched. The mask function tells where every sequence lies in the padded tensors
(:mod:`.placement`), the attention function asks the policy about each sequence alone.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ..attention import choose
from ..masks import Mask
from ..policies.base import looks_before_rotation
from .adapter import Adapter, Site
from .calls import note_call
from .checks import (
    PREFIX,
    attention_modules,
    cache_layers,
    check_forward,
    check_model,
    check_policy,
    check_settings,
    configs,
    decoder_config,
)
from .masking import mask_of
from .rotary import learn_rotaries
from .shard import check_heads, policy_of, shard_of
from .tally import NOT_LOOKED_AT, Tally, kept_mass, sampled_rows

_numbers = itertools.count()

_attaching = threading.Lock()
"""Held from looking whether a model is free until its policy is named in it."""


def sparsify(
    model: PreTrainedModel,
    policy: Any,
    *,
    impl: str = "auto",
    measure: bool = False,
    measure_rows: int = 0,
) -> Run:
    """Let ``policy`` decide what each query of ``model`` reads, until the run is removed.

    Use it as a context manager, or keep the run and call its ``remove``::

        with dynmask.sparsify(model, Streaming(sinks=4, window=1024)) as run:
            model.generate(**inputs)

    Batches may be padded on the left, padded on the right (without a cache to continue from) or
    packed by restarting position_ids (without a cache and a mask, where the architecture's own
    code looks for that; gpt-oss's does not; others are refused). Each sequence is treated as if
    it were alone. Sliding layers keep their window, attention sinks of the model stay.
    Gradients flow to the model's weights; the choice of keys is a constant. With gradient
    checkpointing, call ``backward`` before the run is removed: it computes the forward pass
    again.

    Threads may generate at the same time, with models of their own or with this one: what belongs
    to a call is in its arguments and its cache, so give every thread a cache of its own. The
    policy is the model's, not the thread's: one at a time for all threads that use the model (a
    second is refused; for two at once take a copy of the model with a config of its own), and the
    measurements are sums over all of them. Remove the run when no thread is generating any more.

    A model that was loaded with ``tp_plan="auto"`` is sparsified on every rank: a policy's numbers
    of single heads, a card's, are cut to the heads of the rank, and so are the measurements.

    Args:
        model: a decoder-only transformers model; for one with a vision tower, its text decoder
            is sparsified.
        policy: a policy of ``dynmask.policies`` or any object with their attributes.
        impl: implementation of ``dynmask.attention``.
        measure: count densities. Off by default, it costs about a lowering for each call; do not
            measure where latency is timed.
        measure_rows: query rows of each prefill call and layer whose true attention is computed
            to see how much of it the mask keeps; each decoded token counts as one. More than 0
            implies ``measure``.

    Returns:
        The run, already in effect.

    Raises:
        ValueError: the model, the policy or a setting does not fit; nothing is changed then.
    """
    return Run(model, policy, impl=impl, measure=measure, measure_rows=measure_rows)


class Run(Adapter):
    """A policy at work in a model. Made by :func:`sparsify`.

    Attributes:
        model: the model.
        policy: what decides; under tensor parallelism for the heads of this rank.
        shard: rank and number of the ranks that share every layer's heads; (0, 1) for one.
    """

    def __init__(
        self, model: PreTrainedModel, policy: Any, *, impl: str, measure: bool, measure_rows: int
    ) -> None:
        check_settings(impl, measure_rows)
        with _attaching:
            self._begin(model, policy, impl, measure, measure_rows)

    def _begin(
        self, model: PreTrainedModel, policy: Any, impl: str, measure: bool, measure_rows: int
    ) -> None:
        """Check that the policy fits, and put it to work."""
        check_model(model)
        config = decoder_config(model)
        check_policy(model, policy, config)
        self.model = model
        self.shard = shard_of(model)
        self.policy = policy_of(policy, self.shard)
        self._layers: int = config.num_hidden_layers
        self._heads: int = config.num_attention_heads
        super().__init__(impl)
        self._first_layer = min(int(m.layer_idx) for m in attention_modules(model))  # type: ignore[arg-type]
        self._rows = measure_rows
        self._measured = measure or measure_rows > 0
        self._tally = Tally()
        self._name = f"{PREFIX}{next(_numbers)}"
        self._before: list[tuple[Any, str | None]] = []
        self._hooks: list[Any] = []
        self._modules = weakref.WeakSet(model.modules())
        self._removed = False
        try:
            self._attach()
        except BaseException:
            self.remove()
            raise

    def __enter__(self) -> Run:
        if self._removed:
            raise ValueError(
                "run: expected one that is in effect, received one that was removed; "
                "call dynmask.sparsify again"
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Give the model back as it was; a second call does nothing."""
        for config, implementation in self._before:
            config._attn_implementation_internal = implementation
        for hook in self._hooks:
            hook.remove()
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(self._name, None)
        self._before, self._hooks, self._removed = [], [], True
        self._placements.clear()

    def reset(self) -> None:
        """Clear the measurements."""
        self._tally.clear()

    def summary(self) -> dict[str, Any]:
        """What the masks let through since the start or the last ``reset``.

        Returns:
            ``{"prefill": {...}, "decode": {...}, "impl": {...}}``. A phase holds ``density``
            (kept pairs over causal pairs of all layers and heads), ``density_per_head``
            (layers x heads; None for a layer without attention), ``kept_mass`` (mean share of
            the true attention on kept keys), ``kept_mass_p5`` (its 5th percentile over layers,
            heads and rows), ``kept_mass_per_head`` and ``calls`` (attention calls, one for each
            layer and forward pass). What was not measured is None. ``impl`` counts calls by
            implementation. Where the policy has a guard, ``guard`` holds ``maps`` (maps of all
            layers, sequences and forward passes that it looked at), ``widened`` (how many of them
            it widened, the dense ones among them), ``share`` (of the maps), ``dense`` and
            ``widened_per_head`` (layers x heads, shares).
        """
        return self._tally.summary(self._layers)

    def _attach(self) -> None:
        """Register both functions, name them in the configurations, watch the forwards."""
        # Where the sequences lie is data: torch.compile is to leave a graph here, not to trace.
        AttentionInterface.register(self._name, torch.compiler.disable(self._attend))
        AttentionMaskInterface.register(self._name, mask_of)
        for config in configs(self.model):
            self._before.append((config, config._attn_implementation_internal))
            config._attn_implementation_internal = self._name

        own, scored = cache_layers(self.policy), looks_before_rotation(self.policy)

        def check(module: nn.Module, args: tuple, kwargs: dict) -> None:
            # a mask that the caller has changed in place since is read anew
            self._placements.clear()
            check_forward(module, args, kwargs, own)

        hook: Any = torch.compiler.disable(check)
        for module in self.model.modules():
            if isinstance(module, PreTrainedModel):
                self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        modules = attention_modules(self.model)
        if scored:
            learn_rotaries(self.model, modules)
        if scored or own:
            note: Any = note_call
            for module in modules:
                self._hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))

    @property
    def removed(self) -> bool:
        """Whether the model has been given back."""
        return self._removed

    @property
    def measures_mass(self) -> bool:
        """Whether the true attention is computed for some rows."""
        return self._rows > 0

    def _policy(self, module: nn.Module) -> Any:
        if module not in self._modules:
            raise ValueError(
                f"model: expected layers of the {type(self.model).__name__} that was sparsified, "
                "received one of another model with the same config object, or of a copy; give "
                "every model a config of its own (copy.deepcopy(config)), and copy models before"
            )
        return self.policy

    def _check_heads(self, heads: int) -> None:
        check_heads(heads, self._heads, self.model, self.shard, self.policy)

    def _note(self, site: Site, phase: str, query: Tensor, mask: Mask, bias: Tensor | None) -> None:
        sinks = site.s_aux is not None
        impl = choose(query, mask, bias, sinks).impl if self._impl == "auto" else self._impl
        self._tally.count(phase, impl)

    def _hear(self, site: Site, phase: str, what: str, maps: Tensor) -> None:
        if site.heads is not None:  # maps of the others were not looked at
            of_all = maps.new_full((len(maps), site.heads.of), NOT_LOOKED_AT)
            site.heads.put(of_all, maps)
            maps = of_all
        self._tally.add_widened(site.index, maps)

    def _count(self, site: Site, phase: str, kept: Callable[[], Tensor], causal: int) -> None:
        if self._measured:
            with torch.no_grad():
                self._tally.add_kept(phase, site.index, kept(), causal)

    def _measure(
        self,
        site: Site,
        phase: str,
        mask: Mask,
        first_key: int,
        query: Tensor,
        key: Tensor | None,
    ) -> None:
        if not self._measured:
            return
        with torch.no_grad():
            batch, heads, queries, _ = query.shape
            self._tally.add_density(phase, site.index, mask, heads, batch, first_key)
            if self._rows and key is not None:
                rows = sampled_rows(queries, self._rows)
                shares = kept_mass(query, key, mask, rows, site.scale, site.where.window)
                self._tally.add_mass(phase, site.index, shares)


__all__ = ["Run", "sparsify"]
