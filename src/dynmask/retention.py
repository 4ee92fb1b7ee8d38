"""What a layer retains, and the loss that teaches its scores what to retain."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .masks import LifetimeMask
from .masks.base import check_whole
from .masks.lifetime import check_retention

LATE_ROWS = 256
"""Query rows that count as near the end, where tasks ask their questions."""

LOW_BITS = 12
"""Last bits of a float32 score, half of its 24 digits, that are not looked at where keys are
compared. Values of one token differ there: products of matrices of other sizes, in prefill, in
chunks and in decoding, are rounded otherwise."""

NUMBERS_AT_A_TIME = 2**24
"""Logits (or numbers of keys in float32) that the loss holds at a time: 64 MiB."""


@dataclass(frozen=True)
class Retention:
    """Which keys a query of one layer reads, given the scores.

    Args:
        width: keys that a query reads at most, per kv head; a tuple gives each kv head its own.
        window: newest keys that are always read, the query's own counted, 0 or more.
        sinks: first keys that are always read, 0 or more. Both count in the width.

    Raises:
        ValueError: a number out of range, or a width without room for sinks and window.
    """

    width: int | tuple[int, ...]
    window: int = 0
    sinks: int = 0

    def __post_init__(self) -> None:
        widths = self.width
        if isinstance(widths, Sequence) and not isinstance(widths, str) and widths:
            object.__setattr__(self, "width", tuple(widths))
        else:
            widths = (check_whole("width", widths, 1),)
        check_retention(widths, self.window, self.sinks)

    @property
    def most(self) -> int:
        """Keys that one query reads at most."""
        return self.width if isinstance(self.width, int) else max(self.width)

    @property
    def least(self) -> int:
        """Keys that a query of every kv head may read: up to so many are all read."""
        return self.width if isinstance(self.width, int) else min(self.width)

    def compared(self, scores: Tensor) -> Tensor:
        """Scores as keys are compared by them: float32, without its last ``LOW_BITS``.

        Equal tokens have equal scores in a first layer but for what is rounded off on the way.
        Without it they tie, and the later key wins in prefill, in chunks and in decoding alike.
        Of float64 scores nothing is left of it in float32: they are compared in all its bits.
        """
        narrow = scores.detach().float()
        if scores.dtype == torch.float64:
            return narrow
        bits = narrow.view(torch.int32)
        return (bits & -(1 << LOW_BITS)).view(torch.float32)

    def mask(self, scores: Tensor, queries: int | None = None) -> LifetimeMask:
        """The mask of scores [b, g, k], for the last ``queries`` of the keys."""
        if isinstance(scores, Tensor) and scores.is_floating_point():  # others are refused
            scores = self.compared(scores)
        return LifetimeMask.retained(scores, self.width, self.window, self.sinks, queries=queries)

    def check(self, heads: int) -> Retention:
        """The same, where there is one width for each of ``heads`` kv heads; else ValueError."""
        if not isinstance(self.width, int) and len(self.width) != heads:
            raise ValueError(
                f"width: expected one number, or one for each of {heads} kv heads, received "
                f"{len(self.width)}"
            )
        return self


class ExactRetention(Retention):
    """Compares scores to their last bit: for those that are rounded, or have to be as they are."""

    def compared(self, scores: Tensor) -> Tensor:
        """The scores, float32."""
        return scores.detach().float()


def retention_loss_of(
    query: Tensor,
    key: Tensor,
    scores: Tensor,
    *,
    rows: int = 48,
    after: int = 128,
    scale: float | None = None,
    late: float = 0.25,
    protect: Retention | None = None,
) -> Tensor:
    """How badly the scores foretell which keys later queries look for.

    A few query rows are drawn. Each key's worth is the largest probability that it gets from one
    of them, at least ``after`` positions later, from any head of its group; the softmax is over
    all earlier keys, whatever the mask. The loss is the cross-entropy between these worths,
    normalised over the keys, and the softmax of the scores over the same keys. Its gradient
    reaches the scores alone. Extra memory is O(keys), never N x N.

    Rows come from torch's default generator of the tensors' device, so that gradient checkpointing
    draws them again and a captured CUDA graph draws new ones at every replay. Nothing waits for
    the device.

    Args:
        query: [b, h, q, d], the last q positions, as attention takes it (rotated).
        key: [b, g, k, d], rotated.
        scores: [b, g, k]; compute them from detached keys and values, unless the loss is to
            reach what those come from.
        rows: query rows drawn, the same for all of the batch.
        after: a key's worth counts from so many positions on; what is nearer, a window serves.
        scale: of the logits, ``d ** -0.5`` when None.
        late: share of the rows drawn from the last 256, the rest from all others.
        protect: keys that are read whatever they score need no lesson: its sinks are left out,
            and its window is the least ``after``.

    Returns:
        Scalar, float32 (float64 for float64 scores): the mean over batch and kv heads, in nats.
        0 where the sequence is too short for two keys to be judged.
    """
    _check(query, key, scores, rows, after, late)
    keys, queries, scores = key.shape[2], query.shape[2], at_least_float32(scores)
    sinks = 0
    if protect is not None:
        sinks, after = protect.sinks, max(after, protect.window)
    if keys - after - sinks < 2:  # a key alone has nothing to be told from
        if not torch.compiler.is_compiling():
            warnings.warn(
                f"the retention loss of a sequence is 0: it has no two keys behind {sinks} sinks "
                f"with {after} tokens after them; give longer sequences, or a smaller "
                "retention_after",
                stacklevel=2,
            )
        return scores.sum() * 0
    # A row is of use when a key that is to be judged lies far enough before it.
    first = max(keys - queries, sinks + after)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(query.device.type, enabled=False):
        with torch.no_grad():
            drawn = draw_rows(first, keys, rows, late, query.device)
            worth = _worth(query, key, drawn, after, factor).to(scores.dtype)
            # What follows the last row's reach is judged by none. It is masked, not cut off: its
            # length is known on the device only, and a captured graph draws other rows each time.
            k = torch.arange(keys, device=key.device)
            unjudged = (k > drawn[-1] - after) | (k < sinks)
            worth = worth.masked_fill(unjudged, 0)
            worth = worth / worth.sum(-1, keepdim=True)
        expected = scores.masked_fill(unjudged, float("-inf")).log_softmax(-1)
        return -(worth * expected.masked_fill(unjudged, 0)).sum(-1).mean()


def check_weight(weight: float) -> float:
    """The weight of a retention loss; ValueError unless it is a finite number of at least 0."""
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not 0 <= weight < math.inf:
        raise ValueError(
            f"retention_weight: expected 0 (no loss) or more, a finite number, received {weight!r}"
        )
    return weight


def check_assigned(retention: Retention, heads: int) -> Retention:
    """What is assigned to a layer of so many kv heads; ValueError where it does not fit."""
    if not isinstance(retention, Retention):
        raise ValueError(
            f"retention: expected a Retention, received {retention!r}; assign "
            "Retention(width, window, sinks)"
        )
    return retention.check(heads)


def collect_retention_loss(module: nn.Module) -> Tensor:
    """Sum of the weighted retention losses that the layers below ``module`` have kept.

    Call it once after each forward in training and add it to the loss. Each layer keeps the loss
    of its latest forward, and lets go of it here. Gradient checkpointing must be the
    non-reentrant one: the reentrant one runs the forward without a graph.

    Args:
        module: a model with :class:`dynmask.nn.DynamicMaskAttention` layers, or a converted one.

    Returns:
        Scalar float32; 0 where no layer has kept a loss (evaluation, weight 0).

    Raises:
        ValueError: a loss without a graph.
    """
    losses = []
    for name, layer in module.named_modules():
        loss = getattr(layer, "_retention_loss", None)
        if loss is None:
            continue
        layer._retention_loss = None  # type: ignore[assignment]
        if not loss.requires_grad:
            raise ValueError(
                f"retention loss: expected one with a graph, received one of {name} that was "
                "computed without gradients; leave out this call after a forward under no_grad, "
                "and use non-reentrant checkpointing (use_reentrant=False)"
            )
        losses.append(loss)
    if not losses:
        some = next(module.parameters(), None)
        device = None if some is None else some.device
        return torch.zeros((), dtype=torch.float32, device=device)
    return torch.stack([x.to(losses[0].device) for x in losses]).sum()


def keep_retention_loss(score: nn.Module, loss: Tensor) -> None:
    """Leave a layer's weighted loss with its score module for :func:`collect_retention_loss`.

    Not while a backward pass runs: the forward that checkpointing repeats there has been counted.
    """
    if torch._C._current_graph_task_id() == -1:
        score._retention_loss = loss  # type: ignore[assignment]


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def draw_rows(
    first: int, stop: int, rows: int, late: float, device: torch.device, near: int = LATE_ROWS
) -> Tensor:
    """Drawn rows, ascending, out of [first, stop), a share of them from the last ``near``."""
    split = max(first, stop - near)
    end = min(math.ceil(late * rows), stop - split)
    rest = min(rows - end, split - first)
    end = min(rows - rest, stop - split)
    early = _one_of_each(first, split, rest, device)
    return torch.cat([early, _one_of_each(split, stop, end, device)])


def _one_of_each(first: int, stop: int, parts: int, device: torch.device) -> Tensor:
    """Cut [first, stop) into equal parts and draw one position of each, ascending."""
    borders = first + torch.arange(parts + 1, device=device) * (stop - first) // max(parts, 1)
    share = torch.rand(parts, dtype=torch.float64, device=device)
    return borders[:-1] + (share * borders.diff()).long()


def _worth(query: Tensor, key: Tensor, drawn: Tensor, after: int, scale: float) -> Tensor:
    """Largest probability each key gets from a drawn row: [b, g, k], some heads at a time."""
    batch, heads, queries, dim = query.shape
    groups, keys = key.shape[1:3]
    members = heads // groups
    query = query.detach().view(batch, groups, members, queries, dim)
    query = at_least_float32(query.index_select(3, drawn - (keys - queries))) * scale
    k = torch.arange(keys, device=key.device)
    out = torch.zeros(batch, groups, keys, dtype=query.dtype, device=key.device)
    row = batch * members * keys  # logits of one drawn row of one group
    at_once = max(1, min(len(drawn), NUMBERS_AT_A_TIME // row))
    together = max(1, NUMBERS_AT_A_TIME // max(row * at_once, batch * keys * dim))
    for g in range(0, groups, together):
        own = slice(g, g + together)
        wide = at_least_float32(key[:, own].detach()).mT
        for r in range(0, len(drawn), at_once):
            position = drawn[r : r + at_once, None]
            some = query[:, own, :, r : r + at_once]
            # one product for all members: broadcast, the keys would be copied for each
            logits = (some.flatten(2, 3) @ wide).unflatten(2, some.shape[2:4])
            share = logits.masked_fill_(k > position, float("-inf")).softmax(-1)
            share = share.masked_fill_(k > position - after, 0)
            out[:, own] = torch.maximum(out[:, own], share.amax((2, 3)))
    return out


def _check(query: Tensor, key: Tensor, scores: Tensor, rows: int, after: int, late: float) -> None:
    """Raise ValueError unless everything fits together."""
    check_whole("rows", rows, 1)
    check_whole("after", after, 0)
    if not 0 <= late <= 1:
        raise ValueError(f"late: expected a share from 0 to 1, received {late}")
    fits = query.dim() == key.dim() == 4 and query.shape[0] == key.shape[0]
    fits = fits and query.shape[3] == key.shape[3] and query.shape[2] <= key.shape[2]
    if not fits or query.shape[1] % key.shape[1] or scores.shape != key.shape[:3]:
        raise ValueError(
            "retention loss: expected query [b, h, q, d], key [b, g, k, d] and scores [b, g, k], "
            f"received {tuple(query.shape)}, {tuple(key.shape)} and {tuple(scores.shape)}; "
            "queries are the last q positions of the keys"
        )
