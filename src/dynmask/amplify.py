"""Amplifiers: from mean attention to a score on which one threshold serves all heads.

Attention spans several orders of magnitude, and most of it is close to zero. An amplifier spreads
the small values before the threshold is applied (DAM, arXiv 2506.11104, section on the true mask).
Every amplifier is increasing, so it never reorders the pairs of a head.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Amplifier = Callable[[Tensor, float], Tensor]
"""`(attention [h, L, L], lam) -> score [h, L, L]`, pair by pair in the same order."""


def box_cox(attention: Tensor, lam: float) -> Tensor:
    """`(x^lam - 1) / lam`, and `ln x` at `lam = 0`."""
    return attention.log() if lam == 0 else (attention.pow(lam) - 1) / lam


def log(attention: Tensor, lam: float) -> Tensor:
    """`ln x`: Box-Cox at 0, whatever `lam` says."""
    return attention.log()


def sqrt(attention: Tensor, lam: float) -> Tensor:
    """The square root; `lam` has no part in it."""
    return attention.sqrt()


def yeo_johnson(attention: Tensor, lam: float) -> Tensor:
    """Box-Cox of `1 + x`: nearly linear, since attention lies in [0, 1]."""
    return attention.log1p() if lam == 0 else ((attention + 1).pow(lam) - 1) / lam


def arcsinh(attention: Tensor, lam: float) -> Tensor:
    """The inverse hyperbolic sine; `lam` has no part in it."""
    return attention.asinh()


def min_max(attention: Tensor, lam: float) -> Tensor:
    """Each head's causal pairs brought to [0, 1]; `lam` has no part in it."""
    pairs = _causal_pairs(attention)
    low = pairs.amin(-1)[:, None, None]
    spread = pairs.amax(-1)[:, None, None] - low
    return (attention - low) / spread.clamp(min=torch.finfo(attention.dtype).tiny)


def z_score(attention: Tensor, lam: float) -> Tensor:
    """Each head's causal pairs in standard deviations from their mean; `lam` has no part in it."""
    pairs = _causal_pairs(attention)
    mean = pairs.mean(-1)[:, None, None]
    spread = pairs.std(-1, correction=0)[:, None, None]
    return (attention - mean) / spread.clamp(min=torch.finfo(attention.dtype).tiny)


def _causal_pairs(attention: Tensor) -> Tensor:
    length = attention.shape[-1]
    row, column = torch.tril_indices(length, length, device=attention.device)
    return attention[:, row, column]


AMPLIFIERS: dict[str, Amplifier] = {
    "box_cox": box_cox,
    "log": log,
    "sqrt": sqrt,
    "yeo_johnson": yeo_johnson,
    "min_max": min_max,
    "z_score": z_score,
    "arcsinh": arcsinh,
}


def amplify(
    attention: Tensor, name: str = "box_cox", lam: float = 0.5, eps: float = 1e-8
) -> Tensor:
    """Score of every pair, shifted so that each head's smallest value is 0.

    `attention` is the mean attention [h, L, L]. It is raised to `eps` first. The minimum is taken
    over the whole map: the future pairs, whose attention is 0, set it, so for the elementwise
    amplifiers 0 means "no attention" in every head alike. With Box-Cox at 0.5 a score of tau is
    then a mean attention of `(tau / 2 + sqrt(eps))^2`.
    """
    if name not in AMPLIFIERS:
        raise ValueError(f"amplifier: expected one of {', '.join(AMPLIFIERS)}, received {name!r}.")
    score = AMPLIFIERS[name](attention.tril().clamp(min=eps), lam)
    return score - score.amin((-2, -1), keepdim=True)
