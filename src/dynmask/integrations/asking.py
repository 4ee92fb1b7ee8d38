"""What a policy answers for one sequence of a layer, and attention under the answer.

Nothing here knows where keys come from: the transformers adapter hands over a cache's tensors, the
vLLM plugin what it gathered from pages. So both ask alike, and compute alike.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..attention import attention
from ..errors import bad
from ..masks import LifetimeMask, Mask
from ..plan import Plan
from ..policies import Causal, Gated, Layer
from ..policies.base import evicts, for_prompts_alone


def chooses(policy: Any, index: int) -> bool:
    """Whether scores decide what a layer keeps, beyond sinks and a window."""
    if not evicts(policy):
        return False
    retention = policy.retention(index)
    return retention.most > retention.sinks + retention.window


def _reads_all(policy: Any, keys: int) -> bool:
    """Whether a policy is known to read each of so many keys, before it is asked."""
    if isinstance(policy, Gated):
        return keys <= policy.dense_up_to
    return isinstance(policy, Causal)


def keeps(policy: Any, index: int) -> bool:
    """Whether some maps of a layer, maybe beside others, keep by score."""
    return isinstance(policy, Gated) and policy.keeps(index)


def ask(
    policy: Any,
    layer: Layer,
    phase: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    memo: MutableMapping[Any, Any],
    scores: Tensor | None = None,
) -> tuple[Mask, Tensor | None]:
    """The mask of one sequence (or of equal ones), within the model's window, and a bias.

    Args:
        policy: what decides.
        layer: which call of which layer.
        phase: "prefill" or "decode".
        query: [b, h, q, d].
        key: [b, g, k, d]; the queries are the last q of its positions.
        value: [b, g, k, dv].
        window: the model's own sliding window, its own key counted, or None.
        memo: masks that do not depend on the layer, made once per forward.
        scores: of the keys [b, g, k], of a policy that keeps by score, where they were made before.

    Raises:
        ValueError: a policy that answers for other tensors.
    """
    keys, queries = key.shape[2], query.shape[2]
    limited = window is not None and keys > window
    by_score = chooses(policy, layer.index)
    if window is not None and keeps(policy, layer.index):
        raise bad(
            "gated", f"no maps that keep by score in layer {layer.index}",
            f"some, under the model's own window of {window} keys",
            "Such a layer is bounded already: give its maps a window.",
        )  # fmt: skip
    dense = (
        _reads_all(policy, keys)
        or (phase == "decode" and for_prompts_alone(policy))
        # what a layer's own window has dropped can no longer be ranked
        or (by_score and window is not None)
    )
    own: Mask | None = None
    if dense or limited:
        # made once per forward for all layers; those of one step may have windows of their own
        size = keys, queries, window if limited else None, key.device
        own = memo.get(size)
        if own is None:
            own = LifetimeMask.causal(keys, queries, device=key.device)
            if limited:
                assert window is not None
                own = LifetimeMask.window(keys, window, queries, device=key.device)
            memo[size] = own
        if dense:
            return own, None
    bias = None
    if by_score:
        trains = getattr(policy, "trains", False) and torch.is_grad_enabled()
        with torch.set_grad_enabled(trains):
            scores = policy.scores(key, value, layer) if scores is None else scores
            bias = policy.bias(scores, layer)
        assert scores is not None
        mask: Any = policy.retention(layer.index).mask(scores.detach(), queries)
    else:
        if scores is not None:
            layer = replace(layer, scores=scores)
        with torch.no_grad():
            if getattr(policy, "soft", False):
                mask, bias = policy.biased(query.detach(), key.detach(), value.detach(), layer)
            else:
                mask = policy(query.detach(), key.detach(), value.detach(), layer)
    if not isinstance(mask, Mask) or (mask.keys, mask.queries) != (keys, queries):
        got = f"{mask.queries} x {mask.keys}" if isinstance(mask, Mask) else type(mask).__name__
        raise ValueError(
            f"policy {policy.name}: expected a mask of {queries} queries x {keys} keys "
            f"for layer {layer.index}, received {got}; a policy answers for the tensors it is "
            "given"
        )
    return (mask if own is None else mask & own), bias  # type: ignore[operator]


def compute(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | Plan,
    bias: Tensor | None,
    scale: float,
    s_aux: Tensor | None,
    impl: str,
) -> Tensor:
    """Attention under a mask: [b, h, q, dv]; arguments as in :func:`dynmask.attention`.

    ``s_aux`` is the model's own attention sinks [h], or None.
    """
    if s_aux is None:
        return attention(query, key, value, mask, bias, scale=scale, impl=impl)
    out, lse = attention(query, key, value, mask, bias, scale=scale, return_lse=True, impl=impl)
    # A sink is one more logit without a value: it only scales the softmax down.
    share = torch.sigmoid(lse - s_aux.to(lse)[:, None])
    return (out * share[..., None]).to(out.dtype)


__all__ = ["ask", "chooses", "compute", "keeps"]
