"""Sparse attention in transformers models: one adapter for every architecture.

A policy is attached by registering one function in transformers' attention interface and one in
its mask interface, and naming both in the model's configuration; no modeling code is copied or
patched. The mask function tells where every sequence lies in the padded tensors
(:mod:`.placement`), the attention function asks the policy about each sequence alone.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ..attention import attention, choose
from ..masks import LifetimeMask, Mask, PlacedMask
from ..policies import Causal, Layer
from . import placement
from .checks import (
    PREFIX,
    check_call,
    check_forward,
    check_model,
    check_policy,
    check_settings,
    configs,
    decoder_config,
)
from .placement import Placement
from .tally import Tally, kept_mass, sampled_rows

_numbers = itertools.count()


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
    packed by restarting position_ids (where the architecture's own attention understands that;
    gpt-oss does not). Each sequence is treated as if it were alone. Sliding layers keep their
    window, attention sinks of the model stay. Gradients flow to the model's weights; the choice
    of keys is a constant. With gradient checkpointing, call ``backward`` before the run is
    removed: it computes the forward pass again.

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


class Run:
    """A policy at work in a model. Made by :func:`sparsify`."""

    def __init__(
        self, model: PreTrainedModel, policy: Any, *, impl: str, measure: bool, measure_rows: int
    ) -> None:
        check_settings(impl, measure_rows)
        check_model(model)
        config = decoder_config(model)
        check_policy(model, policy, config)
        self.model = model
        self.policy = policy
        self._layers: int = config.num_hidden_layers
        self._impl = impl
        self._rows = measure_rows
        self._measured = measure or measure_rows > 0
        self._tally = Tally()
        self._placements: dict[tuple[int, ...], tuple[weakref.ref[Tensor], Placement]] = {}
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
            implementation.
        """
        return self._tally.summary(self._layers)

    def _attach(self) -> None:
        """Register both functions, name them in the configurations, watch the forwards."""
        # Where the sequences lie is data: torch.compile is to leave a graph here, not to trace.
        AttentionInterface.register(self._name, torch.compiler.disable(self._attend))
        AttentionMaskInterface.register(self._name, _mask_of)
        for config in configs(self.model):
            self._before.append((config, config._attn_implementation_internal))
            config._attn_implementation_internal = self._name

        def check(module: nn.Module, args: tuple, kwargs: dict) -> None:
            # a mask that the caller has changed in place since is read anew
            self._placements.clear()
            check_forward(module, args, kwargs)

        hook: Any = torch.compiler.disable(check)
        for module in self.model.modules():
            if isinstance(module, PreTrainedModel):
                self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

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
        if module not in self._modules:
            raise ValueError(
                f"model: expected layers of the {type(self.model).__name__} that was sparsified, "
                "received one of another model with the same config object, or of a copy; give "
                "every model a config of its own (copy.deepcopy(config)), and copy models before"
            )
        check_call(module, dropout, softcap, kwargs)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        where = self._placement(attention_mask, query, key, sliding_window)
        out = self._place(int(module.layer_idx), where, query, key, value, scale, s_aux)  # type: ignore[arg-type]
        return out.transpose(1, 2).contiguous(), None

    def _place(
        self,
        index: int,
        where: Placement,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        s_aux: Tensor | None,
    ) -> Tensor:
        """Ask the policy about each sequence, attend once: [b, h, q, dv]."""
        batch, heads, queries, _ = query.shape
        phase = "decode" if queries == 1 and where.has_past else "prefill"
        if not where.spans:
            return query.new_zeros(batch, heads, queries, value.shape[-1])
        common = where.common(batch)
        groups = (
            [(slice(0, batch), *common)]
            if common is not None
            else [
                (slice(s.batch, s.batch + 1), s, n)
                for s, n in zip(where.spans, where.first_keys, strict=True)
            ]
        )
        masks, parts = [], []
        for batches, span, first_key in groups:
            q = query[batches, :, span.queries]
            k, v = key[batches, :, span.keys], value[batches, :, span.keys]
            mask = self._ask(index, phase, where, first_key, q, k, v)
            self._measure(index, phase, where, mask, first_key, q, k, scale)
            masks.append(mask)
            parts.append((q, k, v))
        # Plain causal sequences are fastest one by one; others share one plan and one call.
        if len(groups) > 1 and not all(m.is_causal for m in masks):
            placed = PlacedMask(tuple(masks), where.spans, batch, queries, key.shape[2])
            self._count(phase, query, placed, s_aux)
            return self._compute(query, key, value, placed, scale, s_aux)
        self._count(phase, query, masks[0], s_aux)
        out = None
        for (batches, span, _), mask, (q, k, v) in zip(groups, masks, parts, strict=True):
            part = self._compute(q, k, v, mask, scale, s_aux)
            if part.shape[:3] == query.shape[:3]:
                return part
            if out is None:
                out = query.new_zeros(batch, heads, queries, value.shape[-1])
            out[batches, :, span.queries] = part
        assert out is not None
        return out

    def _ask(
        self,
        index: int,
        phase: str,
        where: Placement,
        first_key: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> Mask:
        """The mask of one sequence (or of equal ones), within the model's own window."""
        keys, queries = key.shape[2], query.shape[2]
        limited = where.window is not None and keys > where.window
        dense = isinstance(self.policy, Causal) or (
            phase == "decode" and self.policy.phase == "prefill"
        )
        if dense or limited:
            # neither depends on the layer: made once per forward
            size = keys, queries, limited, str(key.device)
            own = where.memo.get(size)
            if own is None:
                own = LifetimeMask.causal(keys, queries, device=key.device)
                if limited:
                    assert where.window is not None
                    own = LifetimeMask.window(keys, where.window, queries, device=key.device)
                where.memo[size] = own
            if dense:
                return own
        with torch.no_grad():
            mask = self.policy(
                query.detach(), key.detach(), value.detach(), Layer(index, first_key)
            )
        if not isinstance(mask, Mask) or (mask.keys, mask.queries) != (keys, queries):
            got = f"{mask.queries} x {mask.keys}" if isinstance(mask, Mask) else type(mask).__name__
            raise ValueError(
                f"policy {self.policy.name}: expected a mask of {queries} queries x {keys} keys "
                f"for layer {index}, received {got}; a policy answers for the tensors it is given"
            )
        return mask & own if limited else mask

    def _count(self, phase: str, query: Tensor, mask: Mask, s_aux: Tensor | None) -> None:
        sinks = s_aux is not None
        impl = choose(query, mask, None, sinks).impl if self._impl == "auto" else self._impl
        self._tally.count(phase, impl)

    def _compute(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Mask,
        scale: float,
        s_aux: Tensor | None,
    ) -> Tensor:
        if s_aux is None:
            return attention(query, key, value, mask, scale=scale, impl=self._impl)
        out, lse = attention(query, key, value, mask, scale=scale, return_lse=True, impl=self._impl)
        # A sink is one more logit without a value: it only scales the softmax down.
        share = torch.sigmoid(lse - s_aux.to(lse)[:, None])
        return (out * share[..., None]).to(out.dtype)

    def _measure(
        self,
        index: int,
        phase: str,
        where: Placement,
        mask: Mask,
        first_key: int,
        query: Tensor,
        key: Tensor,
        scale: float,
    ) -> None:
        if not self._measured:
            return
        with torch.no_grad():
            batch, heads, queries, _ = query.shape
            self._tally.add_density(phase, index, mask, heads, batch, first_key)
            if self._rows:
                rows = sampled_rows(queries, self._rows)
                shares = kept_mass(query, key, mask, rows, scale, where.window)
                self._tally.add_mass(phase, index, shares)

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
        if placement.is_linear(mask):
            where = Placement.from_linear(mask, queries, keys)
        else:
            where = Placement.from_bool(mask, batch, queries, keys, sliding_window)
        self._placements[name] = weakref.ref(mask), where
        return where


def _mask_of(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> Tensor:
    """The mask function: positions where the pattern is known, else the booleans of sdpa."""
    if "allow_is_bidirectional_skip" in kwargs:
        raise ValueError(
            "attention: expected causal attention, received a bidirectional mask; "
            "sparsify decoders only"
        )
    sliding = (
        local_size is not None
        and local_size == getattr(config, "sliding_window", None)
        and local_size != getattr(config, "attention_chunk_size", None)
    )
    # Without the leave to skip a mask something lies on top of the plain pattern, except that
    # compiled decoding never gets that leave.
    plain = (allow_is_causal_skip or q_length == 1) and not use_vmap
    size = (batch_size, q_length, kv_length, q_offset, kv_offset)
    if plain and (mask_function is causal_mask_function or sliding):
        window = local_size if sliding else None
        return placement.linear_mask(*size, attention_mask, window, device)
    alone = attention_mask is None and q_length == kv_length and isinstance(q_offset, int)
    if alone and not use_vmap and (q_offset, kv_offset) == (0, 0):
        joined = _packed(mask_function, batch_size, q_length, device)
        if joined is not None:
            window = local_size if sliding else None
            return placement.linear_mask(*size, None, window, device, joined)
    mask = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # type: ignore[arg-type]
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        use_vmap=use_vmap,
        device=device,
    )
    assert mask is not None
    return mask


def _packed(
    mask_function: Callable, batch: int, length: int, device: torch.device | str
) -> Tensor | None:
    """Which neighbours share a sequence, bool [b, length - 1]; None if not packed.

    Index-based mask functions are compositions of transformers' own (causal, sliding, packed,
    blocks read both ways). Two diagonals tell them apart: a packed row does not read its left
    neighbour where a sequence begins, a block reads its right one.
    """
    row = torch.arange(batch, device=device)[:, None]
    head = torch.zeros((), dtype=torch.long, device=device)
    left = torch.arange(length - 1, device=device)[None, :]
    joined = mask_function(row, head, left + 1, left)
    ahead = mask_function(row, head, left, left + 1)
    if bool(ahead.any()) or bool(joined.all()):
        return None
    return joined.expand(batch, -1)


__all__ = ["Run", "sparsify"]
