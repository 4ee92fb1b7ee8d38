"""Greedy generation under a policy, timed, and how far two generations lie apart."""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Generation",
    "attend",
    "bounded_cache",
    "divergence",
    "greedy",
    "is_full",
    "needed_cache",
    "own_summary",
    "stop_tokens",
    "text_config",
]


@dataclass(frozen=True)
class Generation:
    """Greedily chosen tokens, the logits they were chosen from, and the seconds it took.

    ``logits`` is float32 [steps, vocabulary] on the CPU, or None when not asked for.
    ``cache_bytes`` is the size of the cache at the end, or None for one that does not tell.
    """

    tokens: list[int]
    logits: Tensor | None
    prefill_seconds: float
    decode_seconds: float
    cache_bytes: int | None = None

    @property
    def ms_per_token(self) -> float | None:
        """Milliseconds per decoded token; the first token belongs to the prefill."""
        steps = len(self.tokens) - 1
        return 1000 * self.decode_seconds / steps if steps > 0 else None


@torch.inference_mode()
def greedy(
    model: torch.nn.Module,
    ids: Tensor,
    new_tokens: int,
    *,
    stop: Collection[int] = (),
    keep_logits: bool = False,
    cache: Any = None,
    chunk: int = 0,
) -> Generation:
    """Generate up to ``new_tokens`` tokens after the prompt ``ids`` [1, length].

    Args:
        model: a Hugging Face causal language model.
        ids: the prompt's token ids, on the model's device.
        new_tokens: at most this many tokens; exactly this many when ``stop`` is empty.
        stop: ids that end the generation and are not part of the result.
        keep_logits: keep the logits of every step.
        cache: an empty cache to use in place of the model's own.
        chunk: tokens of the prompt that are read at once; 0 reads it whole. A policy that is not
            causal chooses anew for each chunk.

    Raises:
        ValueError: if the prompt is empty or no token is asked for.
    """
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < 1 or new_tokens < 1:
        raise ValueError(
            f"greedy: expected ids of shape [1, length >= 1] and new_tokens >= 1, received "
            f"{tuple(ids.shape)} and {new_tokens}; pass one prompt and ask for a token"
        )
    from transformers import DynamicCache

    from dynmask.integrations.prefill import cache_bytes, keeps_logits, read_chunks

    last_only = {"logits_to_keep": 1} if keeps_logits(model) else {}
    began = _now(ids.device)
    if chunk and cache is None:
        cache = DynamicCache(config=model.config)  # type: ignore[arg-type]
    given = {} if cache is None else {"past_key_values": cache}
    read = read_chunks(model, ids, cache, chunk) if chunk else 0
    output = model(input_ids=ids[:, read:], use_cache=True, **given, **last_only)
    token = output.logits[:, -1].argmax(dim=-1)
    prefilled = _now(ids.device)
    tokens: list[int] = []
    logits: list[Tensor] = []
    while True:
        if keep_logits:
            logits.append(output.logits[0, -1].float().cpu())
        chosen = int(token)
        if chosen in stop:
            break
        tokens.append(chosen)
        if len(tokens) == new_tokens:
            break
        output = model(
            input_ids=token[:, None], past_key_values=output.past_key_values, use_cache=True
        )
        token = output.logits[:, -1].argmax(dim=-1)
    return Generation(
        tokens,
        torch.stack(logits) if keep_logits else None,
        prefilled - began,
        _now(ids.device) - prefilled,
        cache_bytes(output.past_key_values),
    )


def attend(
    model: Any,
    policy: Any,
    impl: str = "auto",
    *,
    measure: bool = False,
    measure_rows: int = 0,
) -> AbstractContextManager[Any]:
    """Return the context in which ``model`` attends by ``policy``; None leaves it untouched.

    ``measure`` and ``measure_rows`` are those of ``dynmask.sparsify``.
    """
    if policy is None:
        return nullcontext(None)
    from dynmask.integrations.transformers import sparsify

    return sparsify(model, policy, impl=impl, measure=measure, measure_rows=measure_rows)


def bounded_cache(run: Any) -> Any:
    """Return a cache of the keys that a run still reads; None where every key may be read again."""
    from dynmask.policies import H2O, Gated
    from dynmask.policies.base import evicts

    if run is None:
        return None
    import dynmask

    try:
        if evicts(run.policy):
            return dynmask.BoundedCache(run)
        if isinstance(run.policy, Gated):
            return dynmask.GatedCache(run)
        if isinstance(run.policy, H2O):
            return dynmask.HeavyHitterCache(run)
    except ValueError:  # a hybrid model keeps its own cache, and gates may need every key
        return None
    return None


def needed_cache(run: Any) -> Any:
    """Return the cache without which a run's policy does not decode by its own rule; None if any.

    Raises:
        ValueError: a hybrid model, which keeps its own cache.
    """
    from dynmask.policies import H2O

    policy = getattr(run, "policy", None)
    heavy = isinstance(policy, H2O)
    if not heavy and getattr(policy, "decode", None) != "keep":
        return None
    import dynmask

    return dynmask.HeavyHitterCache(run) if heavy else dynmask.GatedCache(run)


def text_config(model: Any) -> Any:
    """Return the configuration of the language model, also inside a multimodal one."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def is_full(policy: Any) -> bool:
    """Return whether ``policy`` attends to everything that the model's own attention does."""
    return policy is None or getattr(policy, "name", None) in ("causal", "full")


def own_summary(
    model: torch.nn.Module, prompt: int, new_tokens: int, measure_rows: int
) -> dict[str, Any]:
    """Return, in the form of ``Run.summary()``, what a model's own attention reads.

    Everything, except in layers with a sliding window.
    """
    config = text_config(model)
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    window = getattr(config, "sliding_window", None)
    default = "sliding_attention" if window else "full_attention"
    kinds = getattr(config, "layer_types", None) or [default] * layers
    widths = [window if window and kind == "sliding_attention" else None for kind in kinds]

    def phase(first: int, last: int) -> dict[str, Any]:
        """Rows ``first`` to ``last``: row i can read i + 1 keys, a window of them at most."""
        total = (last * (last + 1) - first * (first + 1)) // 2
        kept = [total if w is None else _windowed(last, w) - _windowed(first, w) for w in widths]
        density = [value / total for value in kept] if total else []
        measured = 1.0 if measure_rows and density else None
        return {
            "density": sum(density) / layers if density else None,
            "kept_mass": measured,
            "kept_mass_p5": measured,
            "density_per_head": [[value] * heads for value in density] or None,
            "kept_mass_per_head": [[1.0] * heads] * layers if measured else None,
        }

    decode = phase(prompt, prompt + max(new_tokens - 1, 0))
    return {"prefill": phase(0, prompt), "decode": decode}


def _windowed(rows: int, width: int) -> int:
    """Pairs that the first ``rows`` rows read through a window of ``width`` keys."""
    full = min(rows, width)
    return full * (full + 1) // 2 + (rows - full) * width


def stop_tokens(model: torch.nn.Module, tokenizer: Any) -> frozenset[int]:
    """Return the ids that end a generation, by the model's settings and the tokenizer's."""
    stop: set[int | None] = set()
    settings = getattr(model, "generation_config", None)
    for found in (getattr(settings, "eos_token_id", None), tokenizer.eos_token_id):
        stop |= set(found) if isinstance(found, list | tuple) else {found}
    return frozenset(token for token in stop if token is not None)


def divergence(reference: Generation, answer: Generation) -> tuple[float | None, float | None]:
    """Return KL(reference || answer) in nats and the share of positions with the same choice.

    Both are counted over the positions that follow the same tokens in both answers, the first
    different choice included: beyond it the two answer different prompts.
    """
    if reference.logits is None or answer.logits is None:
        return None, None
    steps = 1
    for a, b in zip(reference.tokens, answer.tokens, strict=False):
        if a != b:
            break
        steps += 1
    steps = min(steps, len(reference.logits), len(answer.logits))
    p, q = reference.logits[:steps], answer.logits[:steps]
    log_p, log_q = p.log_softmax(dim=-1), q.log_softmax(dim=-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()
    agreement = (p.argmax(dim=-1) == q.argmax(dim=-1)).float().mean()
    return max(float(kl), 0.0), float(agreement)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
