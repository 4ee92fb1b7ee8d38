"""Perplexity by position, and divergence: how a model predicts long real text under each policy.

A mask that loses what is far away shows here as a loss that stops falling with the position. The
text is read in one forward pass, as a prefill is; see ``Row.causal`` for policies that choose
their mask with a view of later tokens, whose perplexity is a lower bound.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dynmask.policies.base import looks_ahead

from .engine import Interrupted, check_policies, mean, mean_per_head, progress_bar
from .generation import attend, is_full, own_summary, text_config
from .journal import policy_fingerprint
from .provenance import environment
from .report import Bucket, Report, Row
from .text import haystack_lines

__all__ = ["bucket_edges", "last_hidden", "perplexity", "text_divergence", "token_losses"]

LOGIT_ELEMENTS = 2**26  # at most this many logits at a time: 256 MiB in float32


def bucket_edges(length: int, first: int = 256) -> list[int]:
    """Return 0, ``first``, twice that, and so on, up to ``length``."""
    edges = [0]
    edge = first
    while edge < length:
        edges.append(edge)
        edge *= 2
    return [*edges, length]


@torch.inference_mode()
def token_losses(model: torch.nn.Module, ids: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Return the negative log-likelihood (nats) of tokens 1 to length - 1 given all before each.

    Args:
        model: a Hugging Face causal language model.
        ids: token ids [1, length], length at least 2.
        hidden: what :func:`last_hidden` returned, to spare the forward pass.

    Returns:
        float32 [length - 1] on the CPU.

    One forward pass; the logits are made a slice of positions at a time, since those of a long
    text at once need more memory than the rest of the model.
    """
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < 2:
        raise ValueError(
            f"ids: expected shape [1, length] with length >= 2, received {tuple(ids.shape)}; "
            "pass one text of two tokens or more"
        )
    losses = [
        torch.nn.functional.cross_entropy(
            logits.float(), ids[0, first + 1 : last + 1].long(), reduction="none"
        ).cpu()
        for first, last, logits in _logits(model, ids, hidden)
    ]
    return torch.cat(losses)


@torch.inference_mode()
def last_hidden(model: Any, ids: Tensor) -> Tensor | None:
    """Return the hidden states [1, length, d] that the head reads; None if it cannot be told."""
    body = getattr(model, "base_model", model)
    return None if body is model else body(input_ids=ids, use_cache=False).last_hidden_state


@torch.inference_mode()
def text_divergence(
    model: torch.nn.Module, ids: Tensor, reference: Tensor, hidden: Tensor
) -> tuple[float, float]:
    """Return KL(reference || other) in nats and the share of positions with the same choice.

    Both are means over the positions but the last, of the next-token distributions that the head
    gives for two hidden states [1, length, d]; logits are made a slice of positions at a time.
    """
    total, same = 0.0, 0
    pairs = zip(_logits(model, ids, reference), _logits(model, ids, hidden), strict=True)
    for (_, _, p), (_, _, q) in pairs:
        log_p, log_q = (logits.float().log_softmax(-1) for logits in (p, q))
        total += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
    count = ids.shape[1] - 1
    return max(total / count, 0.0), same / count


def _logits(
    model: Any, ids: Tensor, hidden: Tensor | None = None
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (first, last, logits [last - first, vocabulary]) for all positions but the last."""
    length = ids.shape[1] - 1
    body = getattr(model, "base_model", model)
    step = max(1, LOGIT_ELEMENTS // text_config(model).vocab_size)
    if hidden is None and (body is model or length <= step):
        output = model(input_ids=ids, use_cache=False)
        yield 0, length, output.logits[0, :length]
        return
    if hidden is None:
        hidden = body(input_ids=ids, use_cache=False).last_hidden_state
    assert hidden is not None
    for first in range(0, length, step):
        last = min(first + step, length)
        # The model's own forward runs on top of a slice of the hidden states, so that whatever it
        # does to logits (soft caps, scales) is done here too.
        with _answering(body, hidden[:, first:last]):
            output = model(input_ids=ids[:, first:last], use_cache=False)
        yield first, last, output.logits[0]


@contextmanager
def _answering(module: Any, hidden: Tensor) -> Iterator[None]:
    """Let ``module`` return ``hidden`` instead of running, inside the context."""
    had = "forward" in vars(module)
    forward = module.forward

    class Output(SimpleNamespace):
        def __getitem__(self, index: int) -> Tensor:
            return (hidden,)[index]

    def answer(*args: Any, **kwargs: Any) -> Any:
        return Output(
            last_hidden_state=hidden, past_key_values=None, hidden_states=None, attentions=None
        )

    module.forward = answer
    try:
        yield
    finally:
        if had:
            module.forward = forward
        else:
            del module.forward


def documents_of(tokenizer: Any, text: str, n: int, length: int) -> list[Tensor]:
    """Return ``n`` pieces [1, length] of the tokens of ``text``, evenly spread over it.

    Raises:
        ValueError: if the text has fewer than ``length`` tokens.
    """
    ids = torch.tensor(list(tokenizer(text, verbose=False)["input_ids"]))
    if len(ids) < length:
        raise ValueError(
            f"text: expected at least the {length} tokens of one document, received {len(ids)}; "
            "pass a longer text or ask for a shorter length"
        )
    room = len(ids) - length
    starts = [room * index // max(n - 1, 1) for index in range(n)]
    return [ids[start : start + length][None] for start in dict.fromkeys(starts)]


def perplexity(
    model: torch.nn.Module,
    tokenizer: Any,
    policies: Mapping[str, Any],
    *,
    text: str | None = None,
    n: int = 4,
    length: int = 8192,
    edges: Sequence[int] | None = None,
    measure_rows: int = 32,
    impl: str = "auto",
    progress: bool = True,
) -> Report:
    """Return perplexity by position bucket, divergence, density and kept mass per policy.

    Divergence is that of the next-token distributions from those of the first policy that reads
    everything, ``None`` or causal, at every position; without one it is not measured.

    Args:
        model: a Hugging Face causal language model.
        tokenizer: its tokenizer.
        policies: a name for the table -> a policy, or None for the model's own attention.
        text: what is read; the standard library's language reference when None.
        n: pieces of the text, evenly spread; they overlap where the text is short.
        length: tokens in a piece.
        edges: bucket edges, rising from 0 to ``length``; doubling from 256 when None.
        measure_rows: query rows per layer whose attention mass is measured; 0: none.
        impl: the attention implementation.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: on an unfitting policy, wrong edges, or a text that is too short.
        Interrupted: on Ctrl-C, with the report of the policies that were finished.
    """
    edges = list(edges) if edges is not None else bucket_edges(length)
    rising = all(a < b for a, b in pairwise(edges))
    if len(edges) < 2 or edges[0] != 0 or edges[-1] != length or not rising:
        raise ValueError(
            f"edges: expected numbers rising from 0 to {length}, received {edges}; "
            f"pass for example {bucket_edges(length)}"
        )
    if n < 1 or length < 2:
        raise ValueError(
            f"expected n >= 1 and length >= 2, received {n} and {length}; ask for more"
        )
    if not policies:
        raise ValueError("policies: expected at least one, received none; pass {'full': None}")
    check_policies(model, policies)
    source = text if text is not None else "\n".join(haystack_lines())
    pieces = documents_of(tokenizer, source, n, length)
    device = next(model.parameters()).device
    header = environment(model)
    header["settings"] = {
        "task": "perplexity",
        "text": "given" if text is not None else "pydoc_data.topics",
        "text_sha256": hashlib.sha256(source.encode()).hexdigest(),
        "policies": {name: policy_fingerprint(policy) for name, policy in policies.items()},
        "n": len(pieces),
        "length": length,
        "edges": edges,
        "seed": None,
        "measure_rows": measure_rows,
        "impl": impl,
    }
    full = next((name for name, policy in policies.items() if is_full(policy)), None)
    references: list[Tensor | None] = [None] * len(pieces)
    done: dict[str, Row] = {}
    try:
        with progress_bar(len(policies) * len(pieces), "perplexity", progress) as bar:
            # What the others are compared with comes first.
            for name in sorted(policies, key=lambda name: name != full):
                policy = policies[name]
                bar.set_postfix_str(name)
                results = []
                for index, piece in enumerate(pieces):
                    ids, reference = piece.to(device), references[index]
                    result, hidden = _measure(model, policy, ids, measure_rows, impl, reference)
                    if name == full and hidden is not None and len(policies) > 1:
                        references[index] = hidden.cpu()
                    results.append(result)
                    bar.update()
                done[name] = _row(name, policy, results, edges, f"{length} tokens")
    except KeyboardInterrupt as interrupt:
        rows = tuple(done[name] for name in policies if name in done)
        raise Interrupted(Report("perplexity", header, rows, (), False)) from interrupt
    return Report("perplexity", header, tuple(done[name] for name in policies), (), True)


def _measure(
    model: torch.nn.Module,
    policy: Any,
    ids: Tensor,
    measure_rows: int,
    impl: str,
    reference: Tensor | None,
) -> tuple[dict[str, Any], Tensor | None]:
    """Return what one policy did with one piece, and the hidden states."""
    kl = agreement = None
    with attend(model, policy, impl, measure=True, measure_rows=measure_rows) as run:
        hidden = last_hidden(model, ids)
        losses = token_losses(model, ids, hidden)
        if hidden is not None and reference is not None:
            kl, agreement = text_divergence(model, ids, reference.to(hidden), hidden)
        summary = (
            run.summary() if run is not None else own_summary(model, ids.shape[1], 0, measure_rows)
        )
    return {"losses": losses, "kl": kl, "agreement": agreement, **summary["prefill"]}, hidden


def _row(
    name: str, policy: Any, results: list[dict[str, Any]], edges: Sequence[int], group: str
) -> Row:
    losses = torch.stack([result["losses"] for result in results]).double()
    buckets = []
    for start, stop in pairwise(edges):
        # Loss i is that of the token at position i + 1; the first token is given, not predicted.
        part = losses[:, max(start - 1, 0) : stop - 1]
        if part.numel():
            buckets.append(Bucket(start, stop, part.numel(), float(part.mean())))
    means: dict[str, Any] = {
        key: mean(result[key] for result in results)
        for key in ("density", "kept_mass", "kept_mass_p5", "kl", "agreement")
    }
    return Row(
        policy=name,
        group=group,
        n=len(results),
        causal=not looks_ahead(policy),
        **means,
        buckets=tuple(buckets),
        perplexity=math.exp(min(float(losses.mean()), 700.0)),
        density_per_head=mean_per_head(result["density_per_head"] for result in results),
        kept_mass_per_head=mean_per_head(result["kept_mass_per_head"] for result in results),
    )
