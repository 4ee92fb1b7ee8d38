"""Gated: every attention map (layer x head) has a gate that says what it reads, and how much."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..encoder import BlockEncoder
from ..errors import bad
from ..kernels import ops
from ..kernels.worth import key_worth
from ..masks import LifetimeMask, Mask, MixedMask
from ..scores import PairScore
from .base import Layer, check_field, last_rows, own_heads
from .blocks import BlockChoice
from .gates import Gates
from .guard import GUARD_ROWS, guarded, widened
from .kept import sampled_rows
from .scoring import ScoreModules
from .slashes import slash_mask

KEPT_POOL = 15
"""Neighbours that are kept together, at least: seven on either side, an answer of some tokens."""

MOST_POOL = 1023
"""Neighbours of a pool at most: each pair of them is a pass over all worths."""

FADE = 1e-4
"""Share of a worth that is lost with each step to a neighbour, so that no two are equal."""


def spread(worth: Tensor, pool: int) -> Tensor:
    """Each key's worth, or that of a neighbour within ``pool``, less a little for each step.

    Of neighbours equally far away the one that follows comes first.

    Args:
        worth: [..., keys], 0 or more.
        pool: odd, the key itself counted.
    """
    out, pad = worth, torch.nn.functional.pad
    for step in range(1, min(pool // 2, worth.shape[-1] - 1) + 1):
        follows = pad(worth[..., :-step], (step, 0)) * (1 - 2 * step * FADE)
        precedes = pad(worth[..., step:], (0, step)) * (1 - (2 * step + 1) * FADE)
        out = torch.maximum(out, torch.maximum(follows, precedes))
    return out


def _run(numbers: list[int]) -> slice | list[int]:
    """Numbers as an index: a slice where they follow each other, which copies nothing."""
    first, stop = numbers[0], numbers[-1] + 1
    return slice(first, stop) if numbers == list(range(first, stop)) else numbers


@dataclass(frozen=True)
class Gated:
    """Sinks, a window, and the columns that the newest queries look at, each as wide as the gate
    of the map allows; or, where a gate says so, diagonals beside columns, blocks that each query
    block chooses for itself, or the keys that a learned score keeps.

    A key's worth is the largest probability it gets from one of the last queries of a call (the
    question, in a prompt; the query itself where decoded tokens choose). The most worthy keys
    outside sinks and window are columns: every later query reads them. Maps whose worth lies in
    their window get none, for a key below ``least`` is not worth reading (the zero-shot gate). With
    ``gates``, window and columns differ from map to map: ``dynmask calibrate`` chooses them
    by what they cost the model's output.

    Maps with ``slashes`` read diagonals besides, keys at the same distance from every query: those
    that get the largest share of the last queries' attention (vertical-slash, arXiv 2407.02490).

    Where what is asked for changes along the input, the newest queries cannot choose for all.
    Maps with ``blocks`` read sinks and window in whole blocks, and those key blocks that pools of
    keys promise most attention to the pools of the query block (:mod:`dynmask.encoder`).

    Maps whose gate says ``kept`` evict by score, as :class:`dynmask.policies.Retained` does: beside
    sinks and window they read the keys that score best of those that have left the window. No
    query chooses these, and what is evicted never returns, so a ``dynmask.GatedCache`` frees it.

    Args:
        sinks: first keys that are always read.
        window: newest keys of every map, without gates.
        columns: most keys that a map chooses, without gates.
        share: so many columns more for each key of the input (blocks for each block), without
            gates.
        least: worth of a column, at least.
        last: queries that are looked at. A question's first words ask too: 64 lose records that 256
            find (``docs/findings.md``).
        pool: neighbours whose worth a key takes over, itself counted, odd: what follows a key
            that is found is what is asked for. Nearer neighbours come first, see :func:`spread`.
        blocks: key blocks that each query block chooses, without gates; needs ``columns=0``.
        block: positions in a block, of queries and of keys.
        query_pool, key_pool: positions in a pool; they divide ``block``.
        slashes: diagonals beyond the window that a map chooses, without gates; not beside blocks.
        gates: numbers for each map; they replace window, columns, share, blocks and slashes.
        scores: for each layer the module that scores its keys, a ``dynmask.nn.PairScore``, or None
            where no map keeps by score; None for no layer.
        encoders: what was trained to score blocks, for each layer or None; the estimate from
            pools alone where there is none.
        soft: add to the logits of a map's columns the logarithm of their worth over that of its
            best column: nothing for that one, the less worthy the more is taken away. What is no
            column has no bias. A column has it for every query, for those too that had it in
            their window. Not for maps that choose blocks, for the kernels know no bias of blocks,
            and not for maps that choose diagonals, which read a column's key for another reason.
        strength: factor of that bias, 0 or more.
        guard: how far the attention that a map keeps may fall short of its promise before the map
            is widened for the call (:mod:`dynmask.policies.guard`); None never looks.
        promise: kept attention that each map is to have, [layers, heads], as a card measured it;
            what ``guard`` needs.
        decode: what a decoded token reads, a call's only query after others; several tokens in a
            call are a prompt (a turn, or tokens that assisted decoding checks). "full" chooses for
            prompts alone, and a decoded token reads every key: one token's choice is made by one
            query, and may lose what the prompt's 256 found. "select" chooses columns anew from all
            keys for every token. "keep" leaves those that the prompt's last queries chose, so that
            a ``dynmask.GatedCache``, which it needs, can drop the other keys. Under both, blocks
            and diagonals are chosen anew, and maps that keep by score go on evicting, with the
            lifetimes that the whole text would have in a prompt. As what follows a key that is
            found is asked for later, the choice of "keep" takes its neighbours along: ``pool`` is
            at least ``KEPT_POOL``.
        dense_up_to: inputs of so many keys are read whole, for choosing among few costs a GPU
            more than it saves (``docs/generator.md``). No cache drops keys then.
        card: the MaskCard that the gates come from; other models than its own are refused.
    """

    sinks: int = 4
    window: int = 256
    columns: int = 768
    share: float = 0.0
    least: float = 1e-3
    last: int = 256
    pool: int = 1
    blocks: int = 0
    block: int = 64
    query_pool: int = 8
    key_pool: int = 8
    slashes: int = 0
    gates: Gates | None = field(default=None, compare=False)
    scores: tuple[nn.Module | None, ...] | None = field(default=None, compare=False, repr=False)
    guard: float | None = None
    promise: Tensor | None = field(default=None, compare=False)
    encoders: tuple[BlockEncoder | None, ...] | None = field(default=None, compare=False)
    soft: bool = False
    strength: float = 1.0
    decode: Literal["full", "select", "keep"] = "full"
    dense_up_to: int = 0
    card: Any = field(default=None, compare=False, repr=False)

    name: ClassVar[str] = "gated"
    causal: ClassVar[bool] = False
    phase: ClassVar[Literal["both", "prefill"]] = "both"

    def __post_init__(self) -> None:
        for name, least in (("sinks", 0), ("window", 1), ("columns", 0), ("last", 1)):
            value = getattr(self, name)
            check_field(self.name, name, value, value >= least, f">= {least}")
        check_field(self.name, "share", self.share, 0 <= self.share <= 1, "in [0, 1]")
        check_field(self.name, "least", self.least, 0 <= self.least <= 1, "in [0, 1]")
        odd = 1 <= self.pool <= MOST_POOL and self.pool % 2 == 1
        check_field(self.name, "pool", self.pool, odd, f"odd and from 1 to {MOST_POOL}")
        self._check_blocks()
        if self.decode not in ("full", "select", "keep"):
            raise bad("gated: decode", "'full', 'select' or 'keep'", repr(self.decode))
        self._check_kinds()
        if self.scores is not None:
            object.__setattr__(self, "scores", tuple(self.scores))
            object.__setattr__(self, "_modules", ScoreModules(self.scores))
        if self.guard is not None:
            check_field(self.name, "guard", self.guard, 0 <= self.guard <= 1, "in [0, 1]")
            if self.promise is None:
                raise ValueError(
                    "gated: expected guard with the kept mass that a card promises, received none "
                    "of it; use a card made by dynmask calibrate, or leave guard out"
                )

    def __deepcopy__(self, memo: Any) -> Gated:
        return self  # nothing changes it: forks of a cache share score heads, encoders and card

    def _check_blocks(self) -> None:
        """Raise ValueError for sizes that are none, and for columns or slashes beside blocks."""
        sizes = {"blocks": 0, "block": 1, "query_pool": 1, "key_pool": 1, "slashes": 0}
        for name, least in sizes.items():
            value = getattr(self, name)
            check_field(self.name, name, value, value >= least, f">= {least}")
        for name in ("query_pool", "key_pool"):
            fits = self.block % getattr(self, name) == 0
            check_field(self.name, name, getattr(self, name), fits, f"that divides {self.block}")
        if self.gates is None and self.blocks and self.columns:
            raise bad(
                "gated", "columns or blocks", f"columns={self.columns} and blocks={self.blocks}",
                "Pass columns=0 beside blocks.",
            )  # fmt: skip
        if self.gates is None and self.blocks and self.slashes:
            raise bad(
                "gated", "slashes or blocks", f"slashes={self.slashes} and blocks={self.blocks}",
                "Leave one of the two out.",
            )  # fmt: skip

    def _check_kinds(self) -> None:
        """Raise ValueError for options that the kinds of maps, or each other, rule out."""
        good = 0 <= self.strength < math.inf
        check_field(self.name, "strength", self.strength, good, "finite and >= 0")
        check_field(self.name, "dense_up_to", self.dense_up_to, self.dense_up_to >= 0, ">= 0")
        if self.dense_up_to and self.decode == "keep":
            raise bad(
                "gated: dense_up_to", "0 where decode='keep' drops keys", self.dense_up_to,
                "Leave one of the two out.",
            )  # fmt: skip
        chooses = self.blocks > 0 if self.gates is None else bool(self.gates.blocks.any())
        if chooses and self.soft:
            raise bad(
                "gated: soft", "maps that choose columns", "maps that choose blocks",
                "Only columns have a bias: leave soft out, or calibrate with "
                "budgets=dynmask.budgets.BUDGETS.",
            )  # fmt: skip
        if self.slashed and self.soft:
            raise bad(
                "gated: soft", "maps that read windows and columns", "maps that choose diagonals",
                "Leave soft or the slashes out.",
            )  # fmt: skip
        if self.soft and self.decode == "keep":
            raise bad(
                "gated: soft", "decode='full' or 'select', which remember no columns", "'keep'",
                "Leave one of the two out.",
            )  # fmt: skip

    def check(self, layers: int, heads: int, kv_heads: int) -> None:
        """Gates and encoders must be those of a model of this shape."""
        tables = {"gates": None if self.gates is None else self.gates.window}
        for name, table in (tables | {"promise": self.promise}).items():
            if table is not None and tuple(table.shape) != (layers, heads):
                raise ValueError(
                    f"gated: expected {name} for {layers} layers of {heads} heads, received "
                    f"{tuple(table.shape)}; calibrate this model"
                )
        if self.encoders is not None:
            sizes = [(len(e.gain), len(e.of_key)) for e in self.encoders if e is not None]
            if len(self.encoders) != layers or set(sizes) - {(heads, kv_heads)}:
                raise bad(
                    "gated",
                    f"encoders for {layers} layers of {heads} heads and {kv_heads} kv heads",
                    f"{len(self.encoders)} of {sizes[:1]}",
                    "Calibrate this model.",
                )
        self._check_scores(layers, kv_heads)

    def _check_scores(self, layers: int, kv_heads: int) -> None:
        """Raise ValueError where maps keep by scores that nothing gives to each kv head."""
        scores = self.scores
        if scores is not None and len(scores) != layers:
            raise bad(
                "gated", f"a score module or None for each of {layers} layers", len(scores),
                "Calibrate this model.",
            )  # fmt: skip
        for layer in range(layers):
            module = None if scores is None else scores[layer]
            if module is None and self.keeps(layer):
                raise bad(
                    "gated", f"a score module for layer {layer}, whose maps keep by score", "none",
                    "Pass scores, or a card made by dynmask calibrate --policy gated --scores.",
                )  # fmt: skip
            if module is None:
                continue
            if not isinstance(module, PairScore):
                raise bad(
                    "gated",
                    "scores that each kv head has from its own keys and values (PairScore)",
                    type(module).__name__,
                    "Calibrate the score heads with head='pair'.",
                )
            if len(module.w_in) != kv_heads:
                raise bad(
                    "gated", f"scores of {kv_heads} kv heads in layer {layer}", len(module.w_in),
                    "Calibrate this model.",
                )  # fmt: skip

    def rows_read(self, queries: int, layer: int) -> list[int] | None:
        """The last ones and those of the guard; all where a map chooses blocks."""
        if self.blocks or (self.gates is not None and bool(self.gates.blocks[layer].any())):
            return None
        looks = self.guard is not None and self.promise is not None
        guards = sampled_rows(queries, GUARD_ROWS) if looks else []
        return sorted({*guards, *last_rows(queries, self.last)})

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> Mask:
        """What each head reads: lifetimes, blocks or diagonals, or some heads this, some that."""
        return self.biased(query, key, value, layer)[0]

    def biased(
        self, query: Tensor, key: Tensor, value: Tensor, layer: Layer
    ) -> tuple[Mask, Tensor | None]:
        """The mask, and what ``soft`` adds to the logits of keys: float32 [b, h, keys], or None."""
        if self.decode == "keep" and query.shape[2] == 1 < key.shape[2]:
            raise bad(
                "gated: decode",
                "a cache that knows what the prompt chose",
                "a decoded token with 'keep' and another cache",
                "Pass past_key_values=dynmask.GatedCache(run), or use decode='full'.",
            )
        if key.shape[2] <= self.dense_up_to:
            return LifetimeMask.causal(key.shape[2], query.shape[2], device=key.device), None
        scores = self._scores(key, value, layer)
        if self.guard is None or self.promise is None or query.shape[2] < GUARD_ROWS:
            return self._mask(query, key, scores, layer)
        least = self.promise[layer.index].cpu() - self.guard
        made, factor = guarded(
            query, key, least, lambda f: self._mask(query, key, scores, layer, f)
        )
        if factor is not None and layer.tell is not None:
            layer.tell("widened", factor)
        return made

    @property
    def grid(self) -> int:
        """0 where the call decides: columns and diagonals by its last queries, a share by its keys,
        the guard.
        """
        tables = (self.columns, self.share, self.slashes)
        if self.gates is not None:
            names = ("columns", "share", "slashes")
            tables = tuple(getattr(self.gates, name).max().item() for name in names)
        alone = self.guard is None and self.dense_up_to == 0
        return self.block if alone and not any(tables) else 0

    def choosing(self) -> Gated:
        """The policy of a call whose choice stays, with any cache."""
        if self.decode != "keep":
            return self
        return replace(self, decode="select", pool=max(self.pool, KEPT_POOL))

    def windows(self, layer: int, heads: int) -> list[int]:
        """The window of each query head of a layer; ``LifetimeMask.INF`` where it is dense."""
        return [self.window] * heads if self.gates is None else self.gates.window[layer].tolist()

    def chooses(self, layer: int, heads: int) -> list[bool]:
        """Which query heads of a layer choose columns, blocks or diagonals, or keep by score."""
        if self.gates is None:
            return [any((self.columns, self.share, self.blocks, self.slashes))] * heads
        names = (item.name for item in fields(self.gates) if item.name != "window")
        tables = [getattr(self.gates, name)[layer] > 0 for name in names]
        return torch.stack(tables).any(0).tolist()

    def chooses_blocks(self, layer: int, heads: int) -> list[bool]:
        """Which query heads of a layer choose blocks."""
        if self.gates is None:
            return [self.blocks > 0] * heads
        return (self.gates.blocks[layer] > 0).tolist()

    def chooses_anew(self, layer: int, heads: int) -> list[bool]:
        """Which query heads of a layer choose for each decoded token: blocks or diagonals."""
        if self.gates is None:
            return [self.blocks > 0 or self.slashes > 0] * heads
        return ((self.gates.blocks[layer] > 0) | (self.gates.slashes[layer] > 0)).tolist()

    @property
    def slashed(self) -> bool:
        """Whether some map chooses diagonals."""
        return self.slashes > 0 if self.gates is None else bool(self.gates.slashes.any())

    @property
    def scored(self) -> bool:
        """Whether some map keeps by score: then keys are looked at as they were before rotation."""
        return self.gates is not None and any(self.gates.keeping)

    def keeps(self, layer: int) -> bool:
        """Whether some map of a layer keeps by score."""
        return self.gates is not None and self.gates.keeping[layer]

    def lives(self, layer: int, heads: int, kv_heads: int) -> list[tuple[int, int] | None]:
        """Of each kv head whose keys live and die by its score alone its window and its kept keys.

        All query heads of its group read the same then; None for other kv heads.
        """
        if self.gates is None or self.decode == "full" or self.dense_up_to:
            return [None] * kv_heads
        pairs = zip(self.gates.window[layer].tolist(), self.gates.kept[layer].tolist(), strict=True)
        members, found = heads // kv_heads, list(pairs)
        groups = (set(found[g * members : (g + 1) * members]) for g in range(kv_heads))
        return [
            own if len(group) == 1 and own[1] and own[0] < LifetimeMask.INF else None
            for group in groups
            for own in [next(iter(group))]
        ]

    def reads_blocks(self, layer: int, heads: int, kv_heads: int) -> list[bool]:
        """Which kv heads of a layer read blocks, and beside them windows and sinks alone."""
        tables = (self.windows, self.chooses, self.chooses_blocks)
        window, chooses, blocks = (torch.tensor(table(layer, heads)) for table in tables)
        narrow = blocks | ((window < LifetimeMask.INF) & ~chooses)
        narrow, blocks = (x.view(kv_heads, -1) for x in (narrow, blocks))
        return (narrow.all(-1) & blocks.any(-1)).tolist()

    def frees(self, layer: int, heads: int, kv_heads: int) -> list[bool]:
        """Which kv heads of a layer have keys that none of their query heads reads again.

        Without those that :meth:`lives` names, which a score tells.
        """
        free = torch.tensor(self.windows(layer, heads)) < LifetimeMask.INF
        free &= torch.tensor(self.dense_up_to == 0 and self.decode != "full")
        anew = self.chooses_anew if self.decode == "keep" else self.chooses
        free &= ~torch.tensor(anew(layer, heads))
        if self.gates is not None:
            free &= self.gates.kept[layer] == 0
        return free.view(kv_heads, -1).all(-1).tolist()

    def of_shard(self, rank: int, ranks: int) -> Gated:
        """The policy of the query heads that a rank holds under tensor parallelism."""
        encoders = [e for e in self.encoders or () if e is not None]
        tables = [self.gates.window[0]] if self.gates is not None else []
        tables += [self.promise[0]] if self.promise is not None else []
        tables += [encoder.gain for encoder in encoders]
        if not tables:
            return self
        return self.of_heads(own_heads(range(len(tables[0])), rank, ranks))

    def of_heads(
        self, heads: Sequence[int], keys: int | None = None, layer: int | None = None
    ) -> Gated:
        """The policy of some query heads of every layer, as if they were all.

        With ``keys`` that of a sequence of so many keys, whatever is left of them; with ``layer``
        for that layer alone, so that the modules of others are not copied.
        """
        gates, promise, encoders, own = self.gates, self.promise, self.encoders, list(heads)
        scores = self._scores_of(own, layer)
        if gates is not None:
            gates = Gates(*(getattr(gates, item.name)[:, own] for item in fields(gates)))
        if promise is not None:
            promise = promise[:, own]
        if encoders is not None:
            encoders = tuple(
                None if e is None or layer not in (None, index) else e.of_heads(own)
                for index, e in enumerate(encoders)
            )
        policy = replace(self, gates=gates, promise=promise, encoders=encoders, scores=scores)
        if keys is None:
            return policy
        if gates is not None:
            columns = (gates.share.double() * keys + gates.columns).clamp(max=keys).int()
            columns, chooses = columns.masked_fill(gates.blocks > 0, 0), gates.blocks > 0
            gates = replace(gates, columns=columns, share=gates.share * chooses)
        if self.blocks:
            return replace(policy, gates=gates)
        columns = int(self.columns + self.share * keys)
        return replace(policy, gates=gates, columns=columns, share=0.0)

    def _scores_of(
        self, heads: list[int], layer: int | None = None
    ) -> tuple[nn.Module | None, ...] | None:
        """The score modules of the kv heads of some query heads, whole groups of them.

        Those of layers (or of one) where some of these heads keep by score.
        """
        if self.scores is None or self.gates is None:
            return None
        kept, found = self.gates.kept[:, heads], list[nn.Module | None]()
        for index, module in enumerate(self.scores):
            asked = layer in (None, index) and bool(kept[index].any())
            if isinstance(module, PairScore) and asked:
                members = self.gates.window.shape[1] // len(module.w_in)
                found.append(module.of_heads(sorted({head // members for head in heads})))
            else:
                found.append(None)
        return tuple(found)

    def score(self, key: Tensor, value: Tensor, layer: Layer) -> Tensor:
        """Score of each key in a layer with maps that keep by score: float32 [b, g, n].

        Args:
            key: [b, g, n, d] as the layer rotated it.
            value: [b, g, n, dv].
            layer: which call of which layer; its ``unrotate`` is of these keys.
        """
        if self.scores is None:
            raise bad(
                "gated: scores", "a score module for maps that keep by score", "none",
                "Pass scores, or a card made by dynmask calibrate --policy gated --scores.",
            )  # fmt: skip
        return self._modules.scores(key, value, layer)  # type: ignore[attr-defined]

    def _scores(self, key: Tensor, value: Tensor, layer: Layer) -> Tensor | None:
        """Scores of a call's keys [b, g, keys], known or made; None where no map keeps by them."""
        if not self.keeps(layer.index):
            return None
        if layer.first_key:
            raise bad(
                "gated", f"all keys of layer {layer.index}, whose maps keep by score",
                f"those from position {layer.first_key} on",
                "A layer with a sliding window of its own is bounded already.",
            )  # fmt: skip
        return self.score(key, value, layer) if layer.scores is None else layer.scores

    def _mask(
        self,
        query: Tensor,
        key: Tensor,
        scores: Tensor | None,
        layer: Layer,
        factor: Tensor | None = None,
    ) -> tuple[Mask, Tensor | None]:
        """Mask and bias of gates, or of gates so many times as wide: ``factor`` [b, h]."""
        heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
        window, columns, blocks, kept, slashes = self._budgets(layer.index, heads, keys, factor)
        if int(window.min()) >= keys:
            return LifetimeMask.causal(keys, queries, device=key.device), None
        by_block, by_slash = (
            x.any(0).nonzero().flatten().tolist() for x in (blocks, slashes * (window < keys))
        )
        own, sinks = sorted(by_block + by_slash), max(self.sinks - layer.first_key, 0)
        if not own:
            return self._lifetimes(query, key, scores, layer, window, columns, kept)
        bias, picked = None, None
        parts: list[tuple[Mask, list[int]]] = []
        if by_block:
            wide = window[:, by_block].clamp(max=keys)
            choice = self._choice(layer.index, key.device)
            own_blocks = blocks[:, by_block]
            chosen = choice.mask(query, key, by_block, wide, sinks, own_blocks, layer.pools)
            parts.append((chosen, by_block))
        if by_slash:
            if most := int(columns.max()):  # once for both kinds that have columns
                width = window.to(key.device, non_blocking=True)[..., None]
                picked = self._columns(query, key, width, layer.first_key, most)
            wide, some = window[:, by_slash], slashes[:, by_slash]
            verticals = self._verticals(key, by_slash, columns, sinks, picked)
            lines = slash_mask(query, key, by_slash, wide, some, verticals, self.last)
            parts.append((lines, by_slash))
        if len(own) < heads:
            window, columns = window.clone(), columns.clone()
            window[:, own], columns[:, own] = 0, 0  # the other parts read for them
            rest = window, columns, kept, picked
            others, bias = self._lifetimes(query, key, scores, layer, *rest)
            parts.insert(0, (others, [head for head in range(heads) if head not in own]))
        if len(parts) == 1:
            return parts[0][0], bias
        of = [next(i for i, (_, some) in enumerate(parts) if h in some) for h in range(heads)]
        return MixedMask(tuple(part for part, _ in parts), tuple(of)), bias

    def _verticals(
        self,
        key: Tensor,
        heads: list[int],
        columns: Tensor,
        sinks: int,
        picked: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Sinks and columns of some heads as lists [b or 1, n, any]; keys are no more than there
        are.

        Args:
            key: [b, g, keys, d].
            heads: n of the query heads.
            columns: most columns of all heads, [b or 1, h], on the host.
            sinks: first keys of the tensor that are always read.
            picked: what :meth:`_columns` found for all heads; None where no head has any.
        """
        keys = key.shape[2]
        lists = torch.arange(min(sinks, keys), device=key.device).expand(1, len(heads), -1)
        if picked is None:
            return lists
        chosen, worth = (x[:, heads] for x in picked)
        chosen = chosen.masked_fill(~self._worthy(columns[:, heads], worth), keys)
        return torch.cat([lists.expand(len(chosen), -1, -1), chosen], -1)

    def _worthy(self, columns: Tensor, worth: Tensor) -> Tensor:
        """Which of the keys of the largest worth, best first [b, h, most], are columns: bool."""
        limit = columns.to(worth.device, non_blocking=True)[..., None]
        keep = (torch.arange(worth.shape[-1], device=worth.device) < limit) & (worth >= self.least)
        return keep & (worth > 0)  # sinks and what is in the window are no columns

    def _choice(self, layer: int, device: torch.device) -> BlockChoice:
        """How the maps of a layer that choose blocks do it."""
        encoder = None if self.encoders is None else self.encoders[layer]
        if encoder is not None:
            encoder = encoder.to(device)  # stays there
        return BlockChoice(self.block, self.query_pool, self.key_pool, encoder)

    def _lifetimes(
        self,
        query: Tensor,
        key: Tensor,
        scores: Tensor | None,
        layer: Layer,
        window: Tensor,
        columns: Tensor,
        kept: Tensor,
        picked: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[LifetimeMask, Tensor | None]:
        """Window, sinks, columns and kept keys as deaths [b, h, keys], and the bias of columns.

        Maps without a window read nothing. ``picked`` is what :meth:`_columns` found, where it was
        asked already.
        """
        batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
        if bool((kept > 0).all()):  # one lifetime for each kv head, where its group is alike
            both = torch.stack([window, kept, columns]).unflatten(2, (key.shape[1], -1))
            if bool((both == both[..., :1]).all()):
                window, kept, columns = both[..., 0]
        k = torch.arange(keys, device=key.device)
        width = window.to(key.device, non_blocking=True)[..., None]
        death = (k + width).clamp(max=LifetimeMask.INF)  # int64: the sum may pass INF
        sinks = death[..., : max(self.sinks - layer.first_key, 0)]
        sinks.masked_fill_(width > 0, LifetimeMask.INF)
        death, bias = death.int().expand(batch, -1, -1), None
        most = int(columns.max())
        if most:
            death = death.clone()  # every batch row has columns of its own
            if picked is None:
                picked = self._columns(query, key, width, layer.first_key, most)
            chosen, worth = picked
            keep = self._worthy(columns, worth)
            old = death.gather(-1, chosen)
            death.scatter_(-1, chosen, old.masked_fill(keep, LifetimeMask.INF))
            if self.soft:
                score = worth.clamp(min=torch.finfo(worth.dtype).tiny).log()
                score = (score - score[..., :1]).masked_fill(~keep, 0).float() * self.strength
                bias = torch.zeros_like(death, dtype=torch.float32).scatter_(-1, chosen, score)
        if scores is not None and bool(kept.any()):
            death = death.clone()
            self._evict(death, scores, window, kept)
        reads = int((window + columns + kept).max()) + self.sinks
        return LifetimeMask(death, queries, most=min(keys, reads)), bias

    def _evict(self, death: Tensor, scores: Tensor, window: Tensor, kept: Tensor) -> None:
        """Write the deaths [b, h, keys] of maps that keep by score.

        Maps of one kv head that keep equally much are ranked once.

        Args:
            death: int32 [b, h, keys]; h may be the kv heads.
            scores: [b, g, keys].
            window, kept: int64 [b or 1, h], on the host; maps whose window holds all keys stay as
                they are.
        """
        (batch, heads, keys), members = death.shape, death.shape[1] // scores.shape[1]
        alike = len(window) == 1
        for row in range(1 if alike else batch):
            rows = slice(0, batch) if alike else slice(row, row + 1)
            near, many = window[row].tolist(), kept[row].tolist()
            own = [head for head in range(heads) if many[head] and near[head] < keys]
            for width in sorted({near[head] for head in own}):
                maps: dict[tuple[int, int], list[int]] = {}
                for head in own:
                    if near[head] == width:
                        maps.setdefault((head // members, many[head]), []).append(head)
                some = scores[rows, _run([group for group, _ in maps])]
                widths = [self.sinks + width + count for _, count in maps]
                found = LifetimeMask.retained(some, widths, width, self.sinks).death
                for number, those in enumerate(maps.values()):
                    death[rows, _run(those)] = found[:, number : number + 1]

    def _budgets(
        self, layer: int, heads: int, keys: int, factor: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Window, columns, blocks, kept and slashes of each head, on the host: int64 [b or 1, h]
        each.
        """
        number = -(-keys // self.block)
        if self.gates is not None:
            window, columns, blocks, kept, slashes = self.gates.of(layer, keys, self.block)
        else:
            window = torch.full((heads,), self.window)
            columns, blocks, kept = (torch.zeros_like(window) for _ in range(3))
            slashes = torch.full_like(window, min(self.slashes, keys))
            if self.blocks:
                blocks += min(int(self.blocks + self.share * number), number)
            else:
                columns += min(int(self.columns + self.share * keys), keys)
        whole = (blocks > 0) & (window + blocks * self.block >= keys)
        whole |= (kept > 0) & (self.sinks + window + kept >= keys)
        whole |= (slashes > 0) & (window + slashes >= keys)
        window = window.masked_fill(whole, LifetimeMask.INF)
        tables = [x.masked_fill(whole, 0) for x in (columns, blocks, kept, slashes)]
        if factor is not None:
            return widened(factor, keys, number, window, *tables)
        return tuple(x[None] for x in (window, *tables))

    def _columns(
        self, query: Tensor, key: Tensor, width: Tensor, first_key: int, most: int
    ) -> tuple[Tensor, Tensor]:
        """The ``most`` keys of the largest worth, best first, and their worth: [b, h, most].

        What sinks and the last row's window hold is worth nothing here: it is read anyway.
        """
        rows, keys = query[:, :, -self.last :], key.shape[2]
        worth_to = ops.key_worth if ops.fused_rows(query) else key_worth
        worth = worth_to(rows, key, width[..., 0])
        if self.pool > 1:
            worth = spread(worth, self.pool)
        worth[..., : max(self.sinks - first_key, 0)] = 0
        if self.pool > 1:  # what spread into the newest row's window is read anyway
            k = torch.arange(keys, device=key.device)
            worth.masked_fill_(k > keys - 1 - width, 0)
        found = worth.topk(most, -1)
        return found.indices, found.values
