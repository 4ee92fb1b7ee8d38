"""Random masks of every kind, at odd sizes, with few queries, rare keys and empty rows."""

import torch
from hypothesis import strategies as st

from dynmask import BlockMask, LifetimeMask, PlacedMask, Span, StructuralMask
from dynmask.masks import MixedMask
from dynmask.masks.base import repeat_heads

HEADS, GROUPS = 4, 2


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def index_sets(g: torch.Generator, b: int, heads: int, n: int, size: int) -> torch.Tensor:
    """Ascending sets of up to ``size`` numbers below n, each head its own count, -1 padded."""
    out = torch.full((b, heads, size), -1, dtype=torch.int32)
    for i in range(b):
        for h in range(heads):
            count = min(int(torch.randint(0, size + 1, (), generator=g)), n)
            chosen = torch.randperm(n, generator=g)[:count].sort().values
            out[i, h, :count] = chosen.int()
    return out


@st.composite
def sizes(draw, most=150):
    keys = draw(st.integers(1, most))
    queries = draw(st.sampled_from([keys, 1, max(keys // 3, 1), max(keys - 1, 1)]))
    return keys, queries


def lifetime(g, keys, queries, b, heads, kind):
    if kind == 0:  # any lifetimes at all: some keys never seen, some rows empty
        death = torch.randint(0, keys + 20, (b, heads, keys), generator=g).int()
        return LifetimeMask(death, queries)
    if kind == 1:
        scores = torch.randn(b, heads, keys, generator=g).round(decimals=1)
        return LifetimeMask.top_w(scores, 1 + keys // 5, queries)
    if kind == 2:
        return LifetimeMask.streaming(keys, keys // 9, 1 + keys // 4, queries)
    return LifetimeMask.causal(keys, queries)


def structural(g, keys, queries, b, heads, length):
    n = keys + 10
    true_mask = None
    if length:
        true_mask = torch.rand(heads, length, length, generator=g) < 0.2
    return StructuralMask(
        index_sets(g, b, heads, n, 9), index_sets(g, b, heads, n, 6), keys, queries, true_mask
    )


def block(g, keys, queries, b, heads, block_q, block_k, share=0.4):
    count = (keys - 1) // block_q - (keys - queries) // block_q + 1
    most = -(-keys // block_k)
    index = index_sets(g, b * count, heads, most, most)  # any lists: own block may be missing
    index = index.view(b, count, heads, most).transpose(1, 2).contiguous()
    return BlockMask(index, block_q, block_k, keys, queries)


@st.composite
def simple_masks(draw, batch=None, size=None, most=150):
    keys, queries = draw(sizes(most)) if size is None else size
    g = generator(draw(st.integers(0, 2**20)))
    b = draw(st.sampled_from([1, 2])) if batch is None else batch
    heads = draw(st.sampled_from([1, GROUPS, HEADS]))
    kind = draw(st.sampled_from(["lifetime", "structural", "block"]))
    if kind == "lifetime":
        return lifetime(g, keys, queries, b, heads, draw(st.integers(0, 3)))
    if kind == "structural":
        length = draw(st.sampled_from([0, 5, 64, 200]))
        return structural(g, keys, queries, b, heads, length)
    block_q, block_k = draw(st.sampled_from([(16, 16), (32, 8), (7, 5), (64, 128)]))
    return block(g, keys, queries, b, heads, block_q, block_k)


@st.composite
def masks(draw, most=150):
    """A mask of any kind: simple, limited, united, or sequences placed in one batch."""
    form = draw(st.sampled_from(["simple", "limited", "united", "placed", "mixed"]))
    if form == "placed":
        return draw(placed_masks(min(most, 60)))
    mask = draw(simple_masks(most=most))
    if form == "mixed":
        mask = draw(mixed_masks(mask))
    if form == "limited" or (form == "mixed" and draw(st.booleans())):
        width = draw(st.integers(1, mask.keys + 3))
        mask = mask & LifetimeMask.window(mask.keys, width, mask.queries)
    if form == "united":
        mask = mask | draw(simple_masks(mask.batch, (mask.keys, mask.queries)))
    return mask


@st.composite
def mixed_masks(draw, mask):
    """Heads that read by ``mask``, and heads that read by another one."""
    other = draw(simple_masks(mask.batch, (mask.keys, mask.queries)))
    of = draw(st.lists(st.integers(0, 1), min_size=HEADS, max_size=HEADS))
    return MixedMask((mask, other), tuple(of))


@st.composite
def placed_masks(draw, most=60):
    """One to three sequences, side by side or in batch rows of their own, with gaps between."""
    count, gap = draw(st.integers(1, 3)), draw(st.integers(0, 5))
    packed = draw(st.booleans())
    lengths = [draw(st.integers(1, most)) for _ in range(count)]
    start, spans = gap, []
    for i, n in enumerate(lengths):
        first = start if packed else gap
        spans.append(Span(0 if packed else i, first, first + n, first, first + n))
        start += n + gap
    total = max(s.key_stop for s in spans) + gap
    own = [draw(simple_masks(1, (n, n))) for n in lengths]
    if draw(st.booleans()):
        own[0] = draw(mixed_masks(own[0]))
    return PlacedMask(own, spans, 1 if packed else count, total, total)


def tensors(
    mask,
    seed=0,
    dtype=torch.float64,
    dim=8,
    heads=HEADS,
    groups=GROUPS,
    value_dim=None,
    device="cpu",
):
    """Query, key and value that fit a mask: the same numbers in every dtype, on every device."""
    g = generator(seed)
    b, wide = mask.batch, dim if value_dim is None else value_dim
    shapes = (
        (b, heads, mask.queries, dim),
        (b, groups, mask.keys, dim),
        (b, groups, mask.keys, wide),
    )
    draws = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    return tuple(x.to(device, dtype) for x in draws)


def poison(mask, key, value):
    """NaN in every key and value that no query head of the group reads, in place."""
    groups = key.shape[1]
    heads = max(mask.heads, groups)
    read = repeat_heads(mask.dense().any(-2), heads).view(mask.batch, groups, -1, mask.keys).any(2)
    key[~read], value[~read] = float("nan"), float("nan")
