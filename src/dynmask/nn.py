"""Dynamic mask attention as a layer: scores, selection, attention, and what teaches the scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .attention import IMPLS, attention
from .cache import KeyStore
from .masks import Mask, PlacedMask, Span
from .masks.base import check_whole
from .retention import (
    Retention,
    check_assigned,
    check_weight,
    collect_retention_loss,
    keep_retention_loss,
    retention_loss_of,
)
from .scores import Form, PairScore, ValueScore

NORM_EPS = 1e-6


class DynamicMaskAttention(nn.Module):
    """Attention in which each query reads the ``width`` keys that score highest.

    Dynamic Mask Attention (arXiv 2508.02124, section 3) with an exact choice for every query: a
    key's score comes from the values at its position, query q reads the best of the keys up to
    q, per kv head, in O(n width) time. The score's bias is added to the logits of the keys, and
    through it the gradient reaches the scores; the choice itself is constant.

    That gradient only reaches keys that were chosen, and alone it trains badly. Two things that
    the paper does not have are therefore on by default: sinks and a ``window`` that are always
    read, and the retention loss (:func:`retention_loss_of`), which :func:`collect_retention_loss`
    hands to the training loop. ``window=0, sinks=0, retention_weight=0`` is the paper's layer.

    Keys are compared by the first half of their scores' digits (:meth:`Retention.compared`), for
    equal tokens have to tie, and the latest win, however a sequence is cut into calls.

    With A = 0, where ``exp`` and ``linear`` begin, all scores tie and the latest keys win: the
    layer starts as a sliding window of ``width``. ``bounded`` begins with A = 1.

    Args:
        hidden_size: channels c of the input and the output.
        num_heads: query heads h.
        num_kv_heads: kv heads g, a divisor of h.
        head_dim: d, ``hidden_size // num_heads`` when None.
        width: keys that a query reads at most; a sequence gives each kv head its own. Assign
            ``layer.retention`` to change it while training.
        window: newest keys that are always read, counted in the width.
        sinks: first keys that are always read, counted in the width.
        form: of the score's bias, see :class:`ValueScore`.
        qk_norm: RMSNorm over the dimensions of each query and key head, before rotation.
        retention_weight: of the retention loss; 0 computes none.
        retention_rows: query rows that the loss draws from each sequence.
        retention_after: positions between a key and the rows that judge it, at least.
        layer_idx: number of the layer, for a cache.
        bias: biases in the four projections.
        impl: implementation of :func:`dynmask.attention`.

    Raises:
        ValueError: sizes that do not fit together.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int | None = None,
        *,
        width: int | Sequence[int],
        window: int = 128,
        sinks: int = 4,
        form: Form = "exp",
        qk_norm: bool = False,
        retention_weight: float = 0.05,
        retention_rows: int = 48,
        retention_after: int = 128,
        layer_idx: int | None = None,
        bias: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check_whole("hidden_size", hidden_size, 1)
        check_whole("num_heads", num_heads, 1)
        if num_heads % check_whole("num_kv_heads", num_kv_heads, 1):
            raise ValueError(
                f"num_kv_heads: expected a divisor of {num_heads} heads, received {num_kv_heads}"
            )
        if impl not in IMPLS:
            raise ValueError(f"impl: expected one of {', '.join(IMPLS)}, received {impl!r}")
        dim = check_whole("head_dim", hidden_size // num_heads if head_dim is None else head_dim, 1)
        self.hidden_size, self.num_heads, self.num_kv_heads = hidden_size, num_heads, num_kv_heads
        self.retention = Retention(width, window, sinks)  # type: ignore[arg-type]
        self.head_dim, self.layer_idx, self.impl = dim, layer_idx, impl
        self.retention_weight = check_weight(retention_weight)
        self.retention_rows = check_whole("retention_rows", retention_rows, 1)
        self.retention_after = check_whole("retention_after", retention_after, 0)
        self.q_proj = nn.Linear(hidden_size, num_heads * dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * dim, hidden_size, bias=bias)
        self.q_norm = nn.RMSNorm(dim, eps=NORM_EPS) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(dim, eps=NORM_EPS) if qk_norm else nn.Identity()
        self.score = ValueScore(num_kv_heads, dim, form)

    @property
    def retention(self) -> Retention:
        """What a query reads. Assign another to change the width while training."""
        return self._retention

    @retention.setter
    def retention(self, retention: Retention) -> None:
        self._retention = check_assigned(retention, self.num_kv_heads)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        spans: Sequence[Span] | None = None,
        past_key_values: KeyStore | Sequence[KeyStore] | None = None,
    ) -> tuple[Tensor, None]:
        """Attend within each sequence, as if it were alone.

        Args:
            hidden_states: [b, n, c].
            position_embeddings: cos and sin, [b or 1, n, r] with r up to d, as transformers'
                rotary embeddings give them; None rotates nothing.
            attention_mask: bool [b, n], True for tokens, one unbroken run in each row. Reading
                it waits for the device: models of several layers call :func:`spans_of_mask`
                once and pass ``spans``.
            spans: where the sequences of a packed or padded input lie, with the same range for
                keys and queries (:func:`dynmask.spans_packed` makes them).
            past_key_values: the layer's store of live keys, or those of all layers, of which
                ``layer_idx`` is taken; the input is what comes after what it has seen. No
                gradient reaches stored keys, and no retention loss is computed.

        Returns:
            Output [b, n, c], and None in the place of attention maps. Rows outside all sequences
            hold what the output projection makes of 0.

        Raises:
            ValueError: shapes that disagree, or a mask that is not as described.
        """
        self._check(hidden_states, position_embeddings)
        batch, length, _ = hidden_states.shape
        if attention_mask is not None:
            if spans is not None:
                raise ValueError(
                    "spans: expected none beside an attention_mask, received both; "
                    "either one says where the sequences lie"
                )
            spans = spans_of_mask(attention_mask, (batch, length))
        shape = (batch, length, -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        plain_key = key  # scores know no positions
        if position_embeddings is not None:
            query, key = rotate(query, key, *position_embeddings)
        # the norm and the rotation may have computed in a wider dtype
        query, key = query.to(value.dtype), key.to(value.dtype)

        scores = self.score(plain_key, value)
        bias, impl = self.score.bias, self.impl
        if past_key_values is not None:
            store = self._store(past_key_values)
            out = store.attend(query, key, value, scores, spans, bias=bias, impl=impl)
            return self.o_proj(out.transpose(1, 2).flatten(2)), None
        mask = _mask(self.retention, scores.detach(), spans)
        out = attention(query, key, value, mask, bias(scores), impl=impl)
        learning = any(p.requires_grad for p in self.score.parameters())
        if self.training and self.retention_weight > 0 and learning:
            self._keep_loss(query, key, plain_key, value, spans)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None

    def _keep_loss(
        self,
        query: Tensor,
        key: Tensor,
        plain_key: Tensor,
        value: Tensor,
        spans: Sequence[Span] | None,
    ) -> None:
        """Compute the retention loss, a mean over positions, and keep it to be collected."""
        # its gradient ends at the score: values are not to be bent to be predictable
        scores = self.score(plain_key.detach(), value.detach())
        parts = [(slice(None), slice(None))] if spans is None else _slices(spans)
        loss, positions = scores.new_zeros(()), 0
        for rows, place in parts:
            part = retention_loss_of(
                query[rows, :, place],
                key[rows, :, place],
                scores[rows, :, place],
                rows=self.retention_rows,
                after=self.retention_after,
                protect=self.retention,
            )
            size = scores[rows, 0, place].numel()
            loss, positions = loss + size * part, positions + size
        keep_retention_loss(self.score, self.retention_weight * loss / positions)

    def _store(self, past: KeyStore | Sequence[KeyStore]) -> KeyStore:
        """This layer's store."""
        if isinstance(past, Sequence):
            if self.layer_idx is None or not 0 <= self.layer_idx < len(past):
                raise ValueError(
                    f"past_key_values: expected a store for layer {self.layer_idx}, received "
                    f"{len(past)} stores; give the layer its layer_idx, and one store for each"
                )
            past = past[self.layer_idx]
        if not isinstance(past, KeyStore):
            raise ValueError(
                "past_key_values: expected a KeyStore, or a list of one for each layer, received "
                f"{type(past).__name__}; make it with KeyStore(layer.retention)"
            )
        if past.retention != self.retention:
            raise ValueError(
                f"past_key_values: expected a store for {self.retention}, received one for "
                f"{past.retention}; make it with KeyStore(layer.retention)"
            )
        return past

    def _check(self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor] | None) -> None:
        shape = tuple(hidden_states.shape)
        if len(shape) != 3 or shape[2] != self.hidden_size or 0 in shape:
            raise ValueError(
                f"hidden_states: expected [b, n, {self.hidden_size}] with a token at least, "
                f"received {shape}"
            )
        batch, length, _ = hidden_states.shape
        if rotary is not None and (len(rotary) != 2 or rotary[0].shape != rotary[1].shape):
            raise ValueError(
                "position_embeddings: expected cos and sin of one shape, received "
                f"{[tuple(x.shape) for x in rotary]}"
            )
        for x in () if rotary is None else rotary:
            fits = x.dim() == 3 and x.shape[0] in (1, batch) and x.shape[1] == length
            if not fits or x.shape[2] > self.head_dim or x.shape[2] % 2:
                raise ValueError(
                    f"position_embeddings: expected cos and sin of [{batch} or 1, {length}, up to "
                    f"{self.head_dim}], received {tuple(x.shape)}"
                )


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding (arXiv 2104.09864), the halves of a head side by side.

    Args:
        query, key: [b, heads, n, d].
        cos, sin: [b or 1, n, r]; the first r of the d dimensions are rotated.
    """
    cos, sin = cos[:, None], sin[:, None]
    size = cos.shape[-1]

    def one(x: Tensor) -> Tensor:
        turned, rest = x[..., :size], x[..., size:]
        low, high = turned.chunk(2, -1)
        turned = turned * cos + torch.cat([-high, low], -1) * sin
        return torch.cat([turned, rest.to(turned.dtype)], -1) if rest.shape[-1] else turned

    return one(query), one(key)


def spans_of_mask(
    attention_mask: Tensor, shape: tuple[int, int] | None = None
) -> list[Span] | None:
    """Where the tokens of each row lie; None where every row is full. Waits for the device.

    Args:
        attention_mask: bool [b, n], True for tokens, one unbroken run in each row.
        shape: (b, n) where it is known.

    Raises:
        ValueError: another type or shape, holes in a row, or no tokens at all.
    """
    mask = attention_mask
    if mask.dtype != torch.bool or mask.dim() != 2 or shape not in (None, tuple(mask.shape)):
        expected = "b, n" if shape is None else f"{shape[0]}, {shape[1]}"
        raise ValueError(
            f"attention_mask: expected bool [{expected}], True for tokens, received {mask.dtype} "
            f"{tuple(mask.shape)}; convert numbers with .bool(), causality needs no mask"
        )
    mask = mask.cpu()
    if bool(mask.all()):
        return None
    edge = torch.nn.functional.pad(mask.int(), (1, 1)).diff(dim=-1)
    starts, stops = (edge == 1).nonzero(), (edge == -1).nonzero()
    rows = starts[:, 0].tolist()
    if len(set(rows)) < len(rows) or not rows:
        raise ValueError(
            "attention_mask: expected one unbroken run of tokens in each row, received "
            f"{'holes in a row' if rows else 'no tokens'}; pass spans for packed sequences"
        )
    ends = zip(rows, starts[:, 1].tolist(), stops[:, 1].tolist(), strict=True)
    return [Span(row, a, b, a, b) for row, a, b in ends]


def _slices(spans: Sequence[Span]) -> list[tuple[slice, slice]]:
    """Batch rows and positions of each span."""
    return [(slice(s.batch, s.batch + 1), s.keys) for s in spans]


def _mask(retention: Retention, scores: Tensor, spans: Sequence[Span] | None) -> Mask:
    """The mask of scores [b, g, n]: of whole rows, or of each sequence alone."""
    if spans is None:
        return retention.mask(scores)
    masks = tuple(retention.mask(scores[rows, :, place]) for rows, place in _slices(spans))
    return PlacedMask(masks, tuple(spans), len(scores), scores.shape[2], scores.shape[2])


__all__ = [
    "DynamicMaskAttention",
    "PairScore",
    "Retention",
    "ValueScore",
    "collect_retention_loss",
    "keep_retention_loss",
    "retention_loss_of",
    "rotate",
    "spans_of_mask",
]
