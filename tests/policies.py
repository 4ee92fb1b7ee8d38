"""One row for each policy, without a card: small settings that leave something out."""

import torch

from dynmask.nn import PairScore, ValueScore
from dynmask.policies import (
    H2O,
    Causal,
    Elastic,
    FlexPrefill,
    Gated,
    OracleBlocks,
    OracleTokens,
    Pooled,
    Quest,
    Retained,
    SnapKV,
    Streaming,
    VerticalSlash,
    XAttention,
)


def score_modules() -> tuple[PairScore, ValueScore]:
    """Two layers of 2 kv heads, head dim 8, with scores that differ."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pair, value = PairScore(2, 8, 4), ValueScore(2, 8, form="bounded")
    with torch.no_grad():
        value.dt_proj.weight.mul_(50)
    return pair.requires_grad_(False), value.requires_grad_(False)


POLICIES = {
    "full": Causal(),
    "streaming": Streaming(sinks=3, window=9),
    "elastic": Elastic(alpha=2, beta=0.2, sinks=3, least=4),
    "vertical_slash": VerticalSlash(verticals=8, slashes=12, last=7, sinks=2, window=4),
    "pooled": Pooled(block=8, top_p=0.6),
    "flexprefill": FlexPrefill(gamma=0.6, tau=0.3, min_budget=8, block=8),
    "xattention": XAttention(stride=4, threshold=0.6, block=8),
    "quest": Quest(budget=12, page=4, dense_layers=0),
    "h2o": H2O(width=16, block=5),
    "snapkv": SnapKV(width=14, last=6, pool=3),
    "gated": Gated(sinks=2, window=5, columns=6, last=7, pool=3, decode="select"),
    "oracle_tokens": OracleTokens(top_k=5),
    "oracle_blocks": OracleBlocks(top_k=3, top_p=0.9, block=8),
    "retained": Retained(score_modules(), width=13, window=5, sinks=2),
}
