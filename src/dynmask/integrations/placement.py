"""Where each sequence lies in an attention call's padded tensors.

transformers carries only 4-D tensors unharmed through all of its caches, and its own mask holds
Q x S booleans. What a sparse attention needs is O(S): the position of every key. Hence a tensor
of four rows, made once per forward (:func:`linear_mask`) and read back once
(:meth:`Placement.from_linear`); masks that come as booleans, made by the caller, are understood
when they are spans in disguise (:meth:`Placement.from_bool`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..masks import Span

# Rows of a linear mask.
POSITION, OLD_KEY, WINDOW, COVERED = range(4)
ROWS = 4
# Values of the position row that are not positions.
HIDDEN, HOLE = -1, -2
# Value of the other rows when there is none.
NONE = -1
# Attribute of a linear mask without padding: what was put in it, (own key, first key, window).
PLAIN = "_dynmask_plain"

PAD_LEFT = (
    "pad on the left (tokenizer.padding_side = 'left') with one unbroken run of tokens per row"
)


@dataclass(frozen=True)
class Placement:
    """The sequences of one attention call.

    Attributes:
        spans: keys and queries of each sequence; rows in no span are padding.
        first_keys: for each span, the position of its first key in its sequence. It is 0 unless
            a sliding cache has dropped what came before.
        window: the model's own sliding window, its own key counted, or None.
        memo: what callers derive from this placement and want to share between layers.
    """

    spans: tuple[Span, ...]
    first_keys: tuple[int, ...]
    window: int | None = None
    memo: dict = field(default_factory=dict, compare=False, repr=False)

    def common(self, batch: int) -> tuple[Span, int] | None:
        """The span and first key that all ``batch`` rows share, when there is one."""
        if len(self.spans) != batch:
            return None
        first, first_key = self.spans[0], self.first_keys[0]
        for row, (span, other) in enumerate(zip(self.spans, self.first_keys, strict=True)):
            if span.batch != row or _extent(span) != _extent(first) or other != first_key:
                return None
        return first, first_key

    def groups(self, batch: int) -> list[tuple[slice, Span, int]]:
        """Batch rows that are asked about together, their span and its first key.

        All layers of a forward have the same.
        """
        name = "groups", batch
        if name not in self.memo:
            common = self.common(batch)
            self.memo[name] = (
                [(slice(0, batch), *common)]
                if common is not None
                else [
                    (slice(s.batch, s.batch + 1), s, n)
                    for s, n in zip(self.spans, self.first_keys, strict=True)
                ]
            )
        return self.memo[name]

    @property
    def has_past(self) -> bool:
        """Whether a query reads keys of an earlier call."""
        return any(
            first_key + span.key_stop - span.key_start > span.query_stop - span.query_start
            for span, first_key in zip(self.spans, self.first_keys, strict=True)
        )

    @classmethod
    def dense(cls, batch: int, queries: int, keys: int, window: int | None) -> Placement:
        """Every batch row is one sequence without padding: what the absence of a mask means."""
        if not 1 <= queries <= keys:
            raise ValueError(
                f"attention without a mask: expected 1 <= queries <= keys, received {queries} "
                f"queries and {keys} keys; cross-attention is not sparsified"
            )
        spans = tuple(Span(b, 0, keys, 0, queries) for b in range(batch))
        return cls(spans, (0,) * batch, window)

    @classmethod
    def from_linear(cls, mask: Tensor, queries: int, keys: int) -> Placement:
        """Read a mask of :func:`linear_mask`; one transfer from the device where rows are padded.

        Raises:
            ValueError: a mask made for other sizes, holes in a row's tokens, or an attention
                mask that ends before the queries do.
        """
        if mask.shape[-1] < keys:
            raise ValueError(
                f"attention_mask: expected {keys} keys, received {mask.shape[-1]}; the cache "
                "hands over other keys than it announced, use transformers' own cache classes"
            )
        plain = getattr(mask, PLAIN, None)
        if plain is not None:  # known on the host: reading the mask would wait for the device
            own, first_key, known_window = plain
            stop = _check_room(own, queries, keys)
            batch = mask.shape[0]
            spans = tuple(Span(row, 0, stop, 0, queries) for row in range(batch))
            return cls(spans, (first_key,) * batch, known_window)
        table = torch.cat([mask[:, 0, POSITION, :keys], mask[:, 0, OLD_KEY:, 0]], -1).cpu()
        old, window, covered = table[0, keys:].tolist()
        own = old + 1
        stop = _check_room(own, queries, keys)
        if covered != NONE and covered < stop:
            raise ValueError(
                "attention_mask: expected one entry for each token seen so far, received "
                f"{stop - covered} too few; append ones for the new tokens, or pass none"
            )
        position = table[:, :stop]
        if bool((position == HOLE).any()):
            rows = (position == HOLE).any(-1).nonzero().flatten().tolist()
            raise ValueError(
                "attention_mask: expected one unbroken run of tokens per batch row, received "
                f"hidden tokens between visible ones in rows {rows}; {PAD_LEFT}"
            )
        before = torch.nn.functional.pad(position[:, :-1], (1, 0), value=HIDDEN)
        after = torch.nn.functional.pad(position[:, 1:], (0, 1), value=HIDDEN)
        seen = position >= 0
        starts = (seen & ((before < 0) | (position != before + 1))).nonzero().tolist()
        stops = (seen & (after != position + 1)).nonzero()[:, 1].tolist()
        found, first_keys = [], []
        for (row, start), last in zip(starts, stops, strict=True):
            if last < own:  # only padding is asked about
                continue
            found.append(Span(row, start, last + 1, max(start - own, 0), last + 1 - own))
            first_keys.append(int(position[row, start]))
        return cls(tuple(found), tuple(first_keys), None if window == NONE else window)

    @classmethod
    def from_bool(
        cls, mask: Tensor, batch: int, queries: int, keys: int, sliding_window: int | None
    ) -> Placement:
        """Recover the spans of a mask bool [b or 1, 1, queries, keys], True where read.

        Raises:
            ValueError: any mask that is not causal attention within spans, with or without one
                sliding window.
        """
        _check_bool(mask, batch, queries, keys)
        mask = mask[:, 0, :, :keys]
        count = mask.sum(-1)
        first = mask.int().argmax(-1)
        last = keys - 1 - mask.flip(-1).int().argmax(-1)
        seen = count > 0
        if bool((seen & (count != last - first + 1)).any()):
            raise _not_spans("a row whose keys are not one unbroken run")
        first, last, seen = (x.cpu() for x in (first, last, seen))
        follows = torch.zeros_like(seen)
        follows[:, 1:] = (
            seen[:, 1:]
            & seen[:, :-1]
            & (last[:, 1:] == last[:, :-1] + 1)
            & (first[:, 1:] >= first[:, :-1])
            & (first[:, 1:] <= last[:, :-1])
        )
        leaves = torch.nn.functional.pad(follows[:, 1:], (0, 1), value=False)
        starts = (seen & ~follows).nonzero().tolist()
        stops = (seen & ~leaves).nonzero()[:, 1].tolist()
        spans, widths, longest = [], set(), 0
        for (row, top), bottom in zip(starts, stops, strict=True):
            start, stop = int(first[row, top]), int(last[row, bottom]) + 1
            length = int(last[row, top]) + 1 - start
            if sliding_window is not None and length >= sliding_window and length > 1:
                raise ValueError(
                    "attention_mask: expected a mask that shows where a sequence starts, received "
                    f"a first query that already fills the sliding window of {sliding_window}; "
                    "pass the 2-D attention_mask of the tokens instead"
                )
            if spans and spans[-1].batch == row and start < spans[-1].key_stop:
                raise _not_spans("rows of two sequences that share keys")
            width, full = _window_of(first[row, top : bottom + 1], last[row, top : bottom + 1])
            widths |= {width} - {None}
            longest = max(longest, full)
            spans.append(Span(row, start, stop, top, bottom + 1))
        window = min(widths, default=None)
        if len(widths) > 1 or (window is not None and longest > window):
            raise _not_spans("windows of several widths")
        if mask.shape[0] == 1 and batch > 1:
            spans = [
                Span(b, s.key_start, s.key_stop, s.query_start, s.query_stop)
                for b in range(batch)
                for s in spans
            ]
        return cls(tuple(spans), (0,) * len(spans), window)


def linear_mask(
    batch: int,
    queries: int,
    keys: int,
    query_offset: int | Tensor,
    key_offset: int,
    attention_mask: Tensor | None,
    window: int | None,
    device: torch.device | str,
    joined: Tensor | None = None,
) -> Tensor:
    """Positions of the keys, O(b keys) instead of O(b queries keys).

    Args:
        batch: batch rows.
        queries: query rows.
        keys: keys of the tensor, unused cache slots included.
        query_offset: tokens before the first query, padding counted.
        key_offset: tokens before the first key, padding counted.
        attention_mask: bool [b, tokens], False for padding; None when there is none. One
            without padding is as none.
        window: sliding window, its own key counted, or None.
        device: where the mask is needed.
        joined: bool [b, keys - 1] for packed rows: key i + 1 is of the sequence of key i.

    Returns:
        int32 [b, 1, 4, keys]. First row: position of the key in its sequence (counted from the
        first token that is not padding), or a negative number when it is hidden. The others are
        constant: index of the last key before the first query's own, window, keys that
        attention_mask covers; each -1 where there is none. Without padding and packing all batch
        rows are one in memory.
    """
    own, covered, seen = query_offset - key_offset, NONE, None
    if attention_mask is not None:
        seen = attention_mask.to(device=device, dtype=torch.bool)
        if isinstance(query_offset, int) and _hides_nothing(seen, query_offset + queries):
            seen = None
    if joined is not None:
        table = _table(_positions_of_packed(joined, key_offset, keys))
    elif seen is not None:
        covered = seen.shape[1] - key_offset
        table = _table(_positions_of_padded(seen, key_offset, keys))
    else:
        table = _counted(key_offset, keys, device)
    for row, constant in ((OLD_KEY, own - 1), (WINDOW, window), (COVERED, covered)):
        if constant is not None and (isinstance(constant, Tensor) or constant != NONE):
            table[:, 0, row] = constant
    out = table if table.shape[0] == batch else table.expand(batch, -1, -1, -1)
    known = joined is None and seen is None and isinstance(own, int)
    if known and not torch.compiler.is_compiling():
        setattr(out, PLAIN, (own, key_offset, window))
    return out


def _hides_nothing(seen: Tensor, tokens: int) -> bool:
    """Whether a mask bool [b, n] says no more of the first ``tokens`` than none would.

    That is read from the device, for then the placement need not be, and costs next to nothing.
    """
    if torch.compiler.is_compiling() or seen.shape[1] < tokens:
        return False
    return bool(seen.all())


def _counted(first: int, keys: int, device: torch.device | str) -> Tensor:
    """A linear mask [1, 1, 4, keys] of positions from ``first`` on, and no constants.

    Two launches: it is made while the device has nothing else to do yet.
    """
    count = torch.arange(first, first + ROWS * keys, dtype=torch.int32, device=device)
    table = count.view(1, 1, ROWS, keys)
    table.narrow(2, POSITION + 1, ROWS - 1).fill_(NONE)
    return table


def _table(position: Tensor) -> Tensor:
    """A linear mask of positions [b, keys], and no constants."""
    table = position.new_full((len(position), 1, ROWS, position.shape[1]), NONE, dtype=torch.int32)
    table[:, 0, POSITION] = position
    return table


def _positions_of_packed(joined: Tensor, first: int, keys: int) -> Tensor:
    """Positions [b, keys] in the sequences that ``joined`` tells apart."""
    token = torch.arange(keys, device=joined.device) + first
    start = torch.nn.functional.pad(~joined, (1, 0), value=True)
    return token - torch.where(start, token, 0).cummax(-1).values


def _positions_of_padded(seen: Tensor, first: int, keys: int) -> Tensor:
    """Positions [b, keys] of keys from token ``first`` on; ``seen`` bool [b, tokens]."""
    token = torch.arange(keys, device=seen.device) + first
    begin = seen.int().argmax(-1, keepdim=True)
    runs = (seen[:, 1:] & ~seen[:, :-1]).sum(-1, keepdim=True) + seen[:, :1]
    here = seen[:, first : first + keys]
    here = torch.nn.functional.pad(here, (0, keys - here.shape[1]), value=False)
    return (token - begin).masked_fill(~here, HIDDEN).masked_fill(runs > 1, HOLE)


def is_linear(mask: Tensor) -> bool:
    """Whether a 4-D mask is one of :func:`linear_mask`."""
    return mask.dtype == torch.int32 and mask.shape[1:3] == (1, ROWS)


def _check_room(own: int, queries: int, keys: int) -> int:
    """The keys that the queries of a linear mask reach; ValueError where there are fewer."""
    stop = own + queries
    if stop > keys or own < 0:
        raise ValueError(
            f"keys: expected at least {stop} (those before the queries, and theirs), "
            f"received {keys}; give the static cache room for the whole generation"
        )
    return stop


def _extent(span: Span) -> tuple[int, int, int, int]:
    return span.key_start, span.key_stop, span.query_start, span.query_stop


def _window_of(first: Tensor, last: Tensor) -> tuple[int | None, int]:
    """Window that one sequence's rows show, if any, and its most keys read without one."""
    moved = first > first[0]
    width = (last - first + 1)[moved]
    if width.numel() and int(width.min()) != int(width.max()):
        raise _not_spans("a window whose width changes")
    whole = (last - first + 1)[~moved]
    return (int(width[0]) if width.numel() else None), int(whole.max())


def _check_bool(mask: Tensor, batch: int, queries: int, keys: int) -> None:
    shape = tuple(mask.shape)
    fits = mask.dim() == 4 and shape[0] in (1, batch) and shape[1] == 1 and shape[2] == queries
    if mask.dtype != torch.bool or not fits or shape[3] < keys:
        raise ValueError(
            f"attention_mask: expected None, a 2-D mask of tokens or bool [{batch}, 1, {queries}, "
            f"{keys}], received {mask.dtype} {shape}; pass the 2-D attention_mask, or "
            "`additive == 0` of an additive one"
        )


def _not_spans(found: str) -> ValueError:
    return ValueError(
        "attention_mask: expected causal attention within each sequence (padded or packed), "
        f"received {found}; prefixes and images that are read in both directions, and custom "
        "patterns, are not supported: keep sdpa for this input"
    )
