"""One row for each policy, without a card: small settings that leave something out."""

import torch

from dynmask.nn import PairScore, ValueScore
from dynmask.policies import H2O, Causal, Pooled, Retained, SnapKV, Streaming, VerticalSlash


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
    "vertical_slash": VerticalSlash(verticals=8, slashes=12, last=7, sinks=2, window=4),
    "pooled": Pooled(block=8, top_p=0.6),
    "h2o": H2O(width=16, block=5),
    "snapkv": SnapKV(width=14, last=6, pool=3),
    "retained": Retained(score_modules(), width=13, window=5, sinks=2),
}
