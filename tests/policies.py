"""One row for each policy that needs no card: small settings that leave something out."""

from dynmask.policies import Causal, Pooled, Streaming, VerticalSlash

POLICIES = {
    "full": Causal(),
    "streaming": Streaming(sinks=3, window=9),
    "vertical_slash": VerticalSlash(verticals=8, slashes=12, last=7, sinks=2, window=4),
    "pooled": Pooled(block=8, top_p=0.6),
}
