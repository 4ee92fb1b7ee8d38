"""Perplexity by position: how well a model predicts long real text under each policy.

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

from .engine import Interrupted, check_policies, mean, mean_per_head, progress_bar
from .generation import attend, own_summary, text_config
from .journal import policy_fingerprint
from .provenance import environment
from .report import Bucket, Report, Row
from .text import haystack_lines

__all__ = ["bucket_edges", "perplexity", "token_losses"]

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
def token_losses(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Return the negative log-likelihood (nats) of tokens 1 to length - 1 given all before each.

    Args:
        model: a Hugging Face causal language model.
        ids: token ids [1, length], length at least 2.

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
        for first, last, logits in _logits(model, ids)
    ]
    return torch.cat(losses)


def _logits(model: Any, ids: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (first, last, logits [last - first, vocabulary]) for all positions but the last."""
    length = ids.shape[1] - 1
    body = getattr(model, "base_model", model)
    step = max(1, LOGIT_ELEMENTS // text_config(model).vocab_size)
    if body is model or length <= step:
        output = model(input_ids=ids, use_cache=False)
        yield 0, length, output.logits[0, :length]
        return
    hidden = body(input_ids=ids, use_cache=False).last_hidden_state
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
    """Return perplexity by position bucket, density and kept mass per policy.

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
    rows: list[Row] = []
    complete = False
    try:
        with progress_bar(len(policies) * len(pieces), "perplexity", progress) as bar:
            for name, policy in policies.items():
                bar.set_postfix_str(name)
                results = []
                for piece in pieces:
                    results.append(_measure(model, policy, piece.to(device), measure_rows, impl))
                    bar.update()
                rows.append(_row(name, policy, results, edges, f"{length} tokens"))
        complete = True
    except KeyboardInterrupt as interrupt:
        raise Interrupted(Report("perplexity", header, tuple(rows), (), complete)) from interrupt
    return Report("perplexity", header, tuple(rows), (), complete)


def _measure(
    model: torch.nn.Module, policy: Any, ids: Tensor, measure_rows: int, impl: str
) -> dict[str, Any]:
    with attend(model, policy, impl, measure=True, measure_rows=measure_rows) as run:
        losses = token_losses(model, ids)
        summary = (
            run.summary() if run is not None else own_summary(model, ids.shape[1], 0, measure_rows)
        )
    return {"losses": losses, **summary["prefill"]}


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
        for key in ("density", "kept_mass", "kept_mass_p5")
    }
    return Row(
        policy=name,
        group=group,
        n=len(results),
        causal=policy is None or bool(policy.causal),
        **means,
        buckets=tuple(buckets),
        perplexity=math.exp(min(float(losses.mean()), 700.0)),
        density_per_head=mean_per_head(result["density_per_head"] for result in results),
        kept_mass_per_head=mean_per_head(result["kept_mass_per_head"] for result in results),
    )
