"""transformers' Doge models (Dynamic Mask Attention, arXiv 2508.02124) in O(n width).

Doge builds its choice of keys into an N x N mask before it asks an attention function, so the
forward of its attention modules is replaced here, and the mask function with it. Weights,
rotation, norms and caches stay the model's own.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import MethodType, TracebackType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function
from transformers.models.doge.modeling_doge import DogeAttention, DogePreTrainedModel

from ..masks import LifetimeMask, Mask
from ..nn import rotate
from ..policies import Layer
from ..policies.base import AnyModel
from ..retention import ExactRetention, Retention
from ..scores import score_values
from . import placement
from .adapter import Adapter, Site
from .cache import BoundedCache, BoundedLayer
from .calls import Call, check_asked
from .checks import PREFIX, check_call, check_forward, check_model, check_settings, configs
from .masking import _packed

MOST = 80.0
"""Scores whose exponential float32 can hold; the model's own code would overflow beyond 88."""

_numbers = itertools.count()


def run_doge(model: PreTrainedModel, *, impl: str = "auto") -> DogeRun:
    """Run the attention of a Doge model through dynmask, until the run is removed.

    The logits are those of ``attn_implementation="eager"``, of which no N x N tensor is made.
    Where scores tie, the later key wins here, and any in the model's own code. ::

        with run_doge(DogeForCausalLM.from_pretrained(name)) as run:
            model.generate(**inputs)

    Batches may be padded on either side or packed by restarting position_ids; gradients flow to
    all weights. With ``past_key_values=dynmask.BoundedCache(run)`` only the keys that are still
    read are kept; other caches hold all keys, whose scores are computed again at every call.

    In models with experts (``is_moe``), padding changes the logits of other tokens: Doge's
    router mixes the tokens of a batch.

    Args:
        model: a model of transformers' Doge family.
        impl: implementation of :func:`dynmask.attention`.

    Raises:
        ValueError: another model, or one that runs a policy already; nothing is changed then.
    """
    return DogeRun(model, impl)


class Doge(AnyModel):
    """What Doge's attention modules keep: the ``keep_window_size`` keys that score highest.

    Args:
        modules: the attention modules.
    """

    name: ClassVar[str] = "doge"
    causal: ClassVar[bool] = True
    phase: ClassVar[Literal["both", "prefill"]] = "both"
    trains: ClassVar[bool] = True

    def __init__(self, modules: list[DogeAttention]) -> None:
        self.modules = {module.layer_idx: module for module in modules}

    def retention(self, layer: int) -> Retention:
        """What a query reads."""
        # to the last bit, as the model's own code compares
        return ExactRetention(self.modules[layer].keep_window_size)

    def scores(self, key: Tensor, value: Tensor, layer: Layer) -> Tensor:
        """Score of each key: float32 [b, g, n]."""
        module = self.modules[layer.index]
        return score_values(value, module.A, module.dt_proj.weight, module.dt_proj.bias)

    def bias(self, scores: Tensor, layer: Layer) -> Tensor:
        """What is added to the logits."""
        return scores.clamp(max=MOST).exp()

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> LifetimeMask:
        """The lifetimes of a layer's keys."""
        scores = self.scores(key, value, layer).detach()
        return self.retention(layer.index).mask(scores, query.shape[2])


class DogeRun(Adapter):
    """Sparse attention at work in a Doge model. Made by :func:`run_doge`."""

    measures_mass: ClassVar[bool] = False

    def __init__(self, model: PreTrainedModel, impl: str) -> None:
        check_settings(impl, 0)
        if not isinstance(model, DogePreTrainedModel):
            raise ValueError(
                f"model: expected one of transformers' Doge family, received "
                f"{type(model).__name__}; dynmask.sparsify is for others"
            )
        check_model(model)
        super().__init__(impl)
        self.model = model
        self.removed = False
        self._name = f"{PREFIX}doge_{next(_numbers)}"
        self._before: list[tuple[Any, str | None]] = []
        self._hooks: list[Any] = []
        self._modules = [m for m in model.modules() if isinstance(m, DogeAttention)]
        self.policy = Doge(self._modules)
        AttentionMaskInterface.register(self._name, _mask_of)
        for config in configs(model):
            self._before.append((config, config._attn_implementation_internal))
            config._attn_implementation_internal = self._name
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                hook = module.register_forward_pre_hook(self._check, with_kwargs=True)
                self._hooks.append(hook)
        forward: Any = torch.compiler.disable(self._forward)
        for module in self._modules:
            # a method, so that it is a copy's own in a copy of the model
            module.forward = MethodType(forward, module)

    def __enter__(self) -> DogeRun:
        if not self.removed:
            return self
        raise ValueError(
            "run: expected one that is in effect, received one that was removed; "
            "call run_doge again"
        )

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
        for module in self._modules:
            del module.forward  # the class has its own
        AttentionMaskInterface._global_mapping.pop(self._name, None)
        self._before, self._hooks, self._modules, self.removed = [], [], [], True
        self._placements.clear()

    def _check(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        # a mask that the caller has changed in place since is read anew
        self._placements.clear()
        check_forward(module, args, kwargs, (BoundedLayer,))

    def _forward(
        self,
        module: DogeAttention,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """What DogeAttention's forward computes: hidden_states [b, n, c]."""
        if not any(module is own for own in self._modules):
            raise ValueError(
                "model: expected layers of the Doge model that run_doge was given, received one of "
                "a copy that was made while the run was on; copy models before"
            )
        dropout = module.attention_dropout if module.training else 0.0
        check_call(module, dropout or 0.0, None, kwargs)
        shape = (*hidden_states.shape[:-1], -1, module.head_dim)
        query = module.q_norm(module.q_proj(hidden_states).view(shape)).transpose(1, 2)
        key = module.k_norm(module.k_proj(hidden_states).view(shape)).transpose(1, 2)
        value = module.v_proj(hidden_states).view(shape).transpose(1, 2)
        query, key = rotate(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, module.layer_idx)
        window = module.config.sliding_window
        where = self._placement(attention_mask, query, key, window)
        index, call = int(module.layer_idx or 0), Call(past_key_values, None, None)
        if index == self._first_layer:
            check_asked(where, query.shape[2])
        site = Site(module, index, self.policy, where, module.scaling, None, call)
        if isinstance(past_key_values, BoundedCache):
            if window is not None:
                raise ValueError(
                    f"BoundedCache: expected a Doge model without a sliding window, received "
                    f"sliding_window={window}; leave the cache to generate()"
                )
            linear = attention_mask is not None and placement.is_linear(attention_mask)
            out = self._bounded(site, past_key_values, linear, query, key, value)
        else:
            out = self._place(site, query, key, value)
        return module.o_proj(out.transpose(1, 2).flatten(2)), None

    def _ask(
        self, site: Site, phase: str, layer: Layer, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Mask, Tensor | None]:
        """The best keys; under a sliding window of the model all of its keys, with their bias."""
        window, keys = site.where.window, key.shape[2]
        if window is None or keys <= window:
            where = replace(site.where, window=None)
            return super()._ask(site._replace(where=where), phase, layer, query, key, value)
        _check_window(window, self.policy.retention(site.index).most)
        mask = LifetimeMask.window(keys, window, query.shape[2], device=key.device)
        return mask, self.policy.bias(self.policy.scores(key, value, layer), layer)


def _check_window(window: int | None, width: int) -> None:
    if window is not None and width < window:
        raise ValueError(
            f"sliding_window: expected at most the {width} keys of keep_window_size, received "
            f"{window}; under both, a key that was outranked may come back, which is no "
            "running choice: use eager attention for this model"
        )


def _mask_of(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> Tensor:
    """The mask function: the position of every key, O(keys)."""
    window = local_size if local_size == getattr(config, "sliding_window", None) else None
    joined = None
    alone = attention_mask is None and q_length == kv_length and isinstance(q_offset, int)
    if mask_function is not causal_mask_function and alone and q_length > 1:
        joined = _packed(mask_function, batch_size, q_length, device)
    if mask_function is not causal_mask_function and joined is None and window is None:
        raise ValueError(
            "attention_mask: expected causal attention, padded or packed, received another "
            "pattern; use eager attention for this input"
        )
    size = (batch_size, q_length, kv_length, q_offset, kv_offset)
    return placement.linear_mask(*size, attention_mask, window, device, joined)


__all__ = ["Doge", "DogeRun", "run_doge"]
