"""Attention maps of a frozen model, averaged over documents while it reads them."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from dynmask.errors import bad
from dynmask.fingerprints import describe_model

_IMPLEMENTATION = "dynmask_capture"


def mean_attention(
    model: nn.Module, windows: Tensor, *, batch: int = 1, progress: bool = False
) -> dict[int, Tensor]:
    """Attention averaged over the documents `windows` [n, L], float32 [h, L, L] for every layer.

    Pairs that a layer's own mask hides (the future, keys beyond a sliding window) have attention 0.
    """
    from tqdm.auto import tqdm
    from transformers import PreTrainedModel

    shape = describe_model(model)
    if not isinstance(model, PreTrainedModel):
        raise bad("model", "a transformers PreTrainedModel", type(model).__name__)
    device = next(model.get_input_embeddings().parameters()).device
    capture = _Capture()
    with (
        _capturing(model, capture),
        tqdm(total=len(windows), desc="calibrating", unit="document", disable=not progress) as bar,
    ):
        for ids in windows.split(batch):
            # The base model, without the head: nobody needs L x vocabulary logits.
            model.base_model(input_ids=ids.to(device), use_cache=False)
            bar.update(len(ids))
    expected = (shape["heads"], windows.shape[1], windows.shape[1])
    for layer in range(shape["layers"]):
        found = capture.sums.get(layer)
        if found is None or tuple(found.shape) != expected:
            raise bad(
                "model",
                f"an attention map {list(expected)} from each of its {shape['layers']} layers",
                f"{'none' if found is None else list(found.shape)} from layer {layer}",
                "Its attention must go through transformers' AttentionInterface in every layer.",
            )
        found /= len(windows)
        if not found.isfinite().all():
            raise bad(
                "model",
                "finite attention",
                f"NaN or infinity in layer {layer}",
                "Load the model in float32 or bfloat16.",
            )
    return capture.sums


class _Capture:
    """An attention function that adds each layer's map to that layer's sum."""

    def __init__(self) -> None:
        self.sums: dict[int, Tensor] = {}

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        layer: Any = module.layer_idx
        heads, rows, columns = query.shape[1], query.shape[2], key.shape[2]
        if layer not in self.sums:
            shape = (heads, rows, columns)
            self.sums[layer] = torch.zeros(shape, dtype=torch.float32, device=query.device)
        outputs = []
        masks = mask.expand(len(query), -1, -1, -1)
        for q, k, v, visible in zip(query, key, value, masks, strict=True):
            probabilities = _attention_map(q, k, visible, scaling, softcap, sinks)
            self.sums[layer] += probabilities
            grouped = probabilities.view(len(k), -1, *probabilities.shape[1:])
            out = grouped @ v.float()[:, None]
            outputs.append(out.flatten(0, 1).transpose(0, 1).to(query.dtype))
        return torch.stack(outputs)


def _attention_map(
    query: Tensor,
    key: Tensor,
    mask: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention probabilities [h, q, k] in float32 of one sequence; query [h, q, d], key [g, k, d].

    `mask` is bool [1, q, k], true where a key may be seen; every row sees at least its own.

    With sinks (a logit per head that belongs to no key) the rows sum to less than 1.
    """
    grouped = query.float().view(len(key), -1, *query.shape[1:])
    logits = (grouped @ key.float()[:, None].transpose(-1, -2)).flatten(0, 1) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, float("-inf"))
    if sinks is None:
        return logits.softmax(-1)
    sink = sinks.float().view(-1, 1, 1).expand(-1, logits.shape[1], 1)
    return torch.cat([logits, sink], -1).softmax(-1)[..., :-1]


_active: ContextVar[_Capture | None] = ContextVar("dynmask_capture", default=None)


def _captured_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The contract of transformers' attention interface; returns ([b, q, h, d], no weights)."""
    capture = _active.get()
    if capture is None:  # the name stays registered after a calibration
        raise RuntimeError(f"{_IMPLEMENTATION} serves dynmask.calibrate only; choose another.")
    if attention_mask is None:
        attention_mask = _causal_mask(query, key, sliding_window)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return capture(module, query, key, value, attention_mask, scale, softcap, s_aux), None


def _causal_mask(query: Tensor, key: Tensor, sliding_window: int | None) -> Tensor:
    queries, keys = query.shape[2], key.shape[2]
    mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    if sliding_window is not None:
        mask = mask.triu(keys - queries - sliding_window + 1)
    return mask[None, None]


def _captured_mask(*args: Any, allow_is_causal_skip: bool = True, **kwargs: Any) -> Any:
    """A full boolean mask for every layer, never None: sliding windows arrive through it."""
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*args, allow_is_causal_skip=False, **kwargs)


@contextlib.contextmanager
def _capturing(model: Any, capture: _Capture) -> Iterator[None]:
    """Route the model's attention through `capture`, in evaluation mode and without gradients."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_IMPLEMENTATION, _captured_attention)
    AttentionMaskInterface.register(_IMPLEMENTATION, _captured_mask)
    before = [(config, config._attn_implementation_internal) for config in _configs(model)]
    training = [(module, module.training) for module in model.modules()]
    token = _active.set(capture)
    try:
        model.set_attn_implementation(_IMPLEMENTATION)
        model.eval()
        with torch.no_grad():
            yield
    finally:
        _active.reset(token)
        # Written directly: set_attn_implementation validates, loads and may refuse what was there.
        for config, implementation in before:
            config._attn_implementation_internal = implementation
        for module, mode in training:
            module.training = mode


def _configs(model: nn.Module) -> list[Any]:
    """Every configuration object in the model, each once."""
    found: dict[int, Any] = {}
    pending = [module.config for module in model.modules() if hasattr(module, "config")]
    while pending:
        config: Any = pending.pop()
        if id(config) in found or not hasattr(config, "_attn_implementation_internal"):
            continue
        found[id(config)] = config
        pending += [getattr(config, name, None) for name in config.sub_configs]
    return list(found.values())
