"""Scores: how much a layer wants to retain each key."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .masks.base import check_whole

Form = Literal["exp", "linear", "bounded"]

INITIAL_A = {"exp": 0.0, "linear": 0.0, "bounded": 1.0}
"""A at the start. The paper's forms start at its 0: all scores tie and the latest keys win, so a
layer begins as a sliding window. Bounded starts at 1, the value that was measured to train."""

INITIAL_STD = 0.02
"""Spread of dt_proj at the start: scores differ little, and no key is favoured for long."""

CAP = 10.0
"""Largest s whose exponential is taken for a bias. exp(10) is 22,026: one key more or less of
that is all or nothing in a softmax, and float32 still tells logits apart to 0.002 beside it."""

BOUND = 4.0
"""Largest bias of the bounded form."""

NUMBERS_AT_A_TIME = 2**24
"""Numbers in the float32 copy of keys or values that is held at a time: 64 MiB."""


class Score(nn.Module):
    """What score modules have in common: they hold a layer's retention loss until it is collected.

    See :func:`dynmask.nn.collect_retention_loss`.

    Attributes:
        reads_keys: whether a score depends on the key, not on values alone.
    """

    reads_keys: ClassVar[bool] = True
    _retention_loss: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle leaves the loss behind: its graph belongs to this forward."""
        return {k: v for k, v in self.__dict__.items() if k != "_retention_loss"}


class ValueScore(Score):
    """Score of a key from the values at its position (arXiv 2508.02124, section 3.1).

    ``exp`` and ``linear``: ``s = A softplus(dt_proj(values))``, ``bounded``:
    ``s = A dt_proj(values)``, where values are those of all kv heads, side by side. Scores are
    float32 whatever autocast says (float64 for float64 values).

    Args:
        kv_heads: kv heads g, each with a score of its own.
        head_dim: dimensions of a value.
        form: what is added to the logits: ``exp`` is the paper's and transformers' Doge's
            ``exp(s)``, ``linear`` s itself, ``bounded`` ``4 tanh(s / 4)``.

    Attributes:
        A: [g], starts at 0 (``exp``, ``linear``) or 1 (``bounded``).
        dt_proj: g d -> g, no bias; starts normal with spread 0.02.
        cap: ``exp`` is unbounded for A > 0, so the bias grows no further where s > cap, and
            there has no gradient. Selection knows no cap.
    """

    reads_keys: ClassVar[bool] = False

    def __init__(self, kv_heads: int, head_dim: int, form: Form = "exp") -> None:
        super().__init__()
        check_whole("kv_heads", kv_heads, 1)
        check_whole("head_dim", head_dim, 1)
        if form not in get_args(Form):
            raise ValueError(
                f"form: expected one of {', '.join(get_args(Form))}, received {form!r}"
            )
        self.form: Form = form
        self.cap = CAP
        self.A = nn.Parameter(torch.empty(kv_heads))
        self.dt_proj = nn.Linear(kv_heads * head_dim, kv_heads, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values."""
        nn.init.constant_(self.A, INITIAL_A[self.form])
        nn.init.normal_(self.dt_proj.weight, std=INITIAL_STD)

    def forward(self, key: Tensor | None, value: Tensor) -> Tensor:
        """Scores [b, g, k] of values [b, g, k, d]; the key is not looked at."""
        return score_values(value, self.A, self.dt_proj.weight, soft=self.form != "bounded")

    def bias(self, scores: Tensor) -> Tensor:
        """What is added to the scaled logits of each key: [b, g, k]."""
        if self.form == "exp":
            return scores.clamp(max=self.cap).exp()
        if self.form == "linear":
            return scores
        return BOUND * torch.tanh(scores / BOUND)

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"form={self.form!r}"


class PairScore(Score):
    """Score of a key from itself and its value, by a small network for each kv head.

    Made for models that are kept as they are: a position's key and value say more than its
    values alone. Keys are those before rotation, so that a score is not about the position.
    Both are brought to unit size, their sizes go in beside them as logarithms: models differ
    by orders of magnitude there. Scores are float32 whatever autocast says (float64 for float64
    keys).

    Args:
        kv_heads: kv heads g, each with weights of its own.
        head_dim: dimensions of a key, and of a value.
        hidden: units of the hidden layer.
    """

    def __init__(self, kv_heads: int, head_dim: int, hidden: int = 64) -> None:
        super().__init__()
        check_whole("kv_heads", kv_heads, 1)
        check_whole("head_dim", head_dim, 1)
        check_whole("hidden", hidden, 1)
        inputs = 2 * head_dim + 2
        self.w_in = nn.Parameter(torch.empty(kv_heads, inputs, hidden))
        self.b_in = nn.Parameter(torch.empty(kv_heads, 1, hidden))
        self.w_out = nn.Parameter(torch.empty(kv_heads, hidden, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values: each layer keeps the size of what it is given, scores start small."""
        inputs, hidden = self.w_in.shape[1:]
        nn.init.normal_(self.w_in, std=inputs**-0.5)
        nn.init.zeros_(self.b_in)
        nn.init.normal_(self.w_out, std=0.1 * hidden**-0.5)

    def forward(self, key: Tensor, value: Tensor) -> Tensor:
        """Scores [b, g, k] of keys before rotation and values, both [b, g, k, d]."""
        with torch.autocast(value.device.type, enabled=False):
            parts = zip(_parts(key), _parts(value), strict=True)
            found = [self._score(k, v) for k, v in parts]
            return found[0] if len(found) == 1 else torch.cat(found, -1)

    def _score(self, key: Tensor, value: Tensor) -> Tensor:
        dtype = _dtype(value)
        # in one, for a decoded token waits for every operation
        units, sizes = _unit(torch.stack([key.to(dtype), value.to(dtype)]))
        x = torch.cat([*units, *sizes], -1)
        hidden = nn.functional.silu(x @ self.w_in.to(dtype) + self.b_in.to(dtype))
        return (hidden @ self.w_out.to(dtype))[..., 0]

    def of_heads(self, heads: Sequence[int]) -> PairScore:
        """The scores of some kv heads: the same numbers, and nothing is learned through them."""
        part = copy.copy(self)
        part._parameters = {}
        for name, x in self.named_parameters():
            setattr(part, name, nn.Parameter(x.detach()[list(heads)], False))
        return part

    def bias(self, scores: Tensor) -> None:
        """Nothing is added to the logits."""
        return None

    def extra_repr(self) -> str:
        """Shown by print."""
        kv_heads, inputs, hidden = self.w_in.shape
        return f"kv_heads={kv_heads}, head_dim={inputs // 2 - 1}, hidden={hidden}"


def score_values(
    value: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None = None, *, soft: bool = True
) -> Tensor:
    """``A softplus(dt_proj(values))``, without softplus unless ``soft``, in float32 at least.

    Args:
        value: [b, g, k, d].
        a: [g].
        weight, bias: of dt_proj, [g, g d] and [g].
        soft: with the softplus.

    Returns:
        [b, g, k].
    """
    x = _Project.apply(value, weight)
    if bias is not None:
        x = x + bias.to(x.dtype)[:, None]
    if soft:
        x = nn.functional.softplus(x)
    return x * a.to(x.dtype)[:, None]


class _Project(torch.autograd.Function):
    """dt_proj without its bias: values [b, g, k, d] and weight [g, g d] to float32 [b, g, k].

    What autograd would keep for the gradient is a float32 copy of all values, twice as large as
    the values of a model in half precision. This keeps the values themselves.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(value, weight)
        with torch.autocast(value.device.type, enabled=False):
            wide = weight.to(_dtype(value))
            return torch.cat([wide @ _side_by_side(part).mT for part in _parts(value)], 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        value, weight = ctx.saved_tensors
        for_value, for_weight = ctx.needs_input_grad
        wide = weight.to(_dtype(value))
        of_value, of_weight = [], torch.zeros_like(wide)
        with torch.autocast(value.device.type, enabled=False):
            parts = _parts(value)
            grads = grad.split(parts[0].shape[2], 2)
            for part, g in zip(parts, grads, strict=True):
                if for_weight:
                    of_weight += (g @ _side_by_side(part)).sum(0)
                if for_value:
                    back = (g.mT @ wide).unflatten(-1, (value.shape[1], value.shape[3]))
                    of_value.append(back.transpose(1, 2).to(value.dtype))
        return (
            torch.cat(of_value, 2) if for_value else None,
            of_weight.to(weight.dtype) if for_weight else None,
        )


def _dtype(x: Tensor) -> torch.dtype:
    """float32, float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def _side_by_side(value: Tensor) -> Tensor:
    """Values of all kv heads at each position: [b, g, k, d] to float32 [b, k, g d]."""
    return value.transpose(1, 2).flatten(2).to(_dtype(value))


def _parts(value: Tensor) -> tuple[Tensor, ...]:
    """Parts of the positions whose values are ``NUMBERS_AT_A_TIME`` at most."""
    b, g, _, d = value.shape
    return value.split(max(NUMBERS_AT_A_TIME // (b * g * d), 1), 2)


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors of root mean square 1, and the logarithm of what theirs was [..., 1]."""
    square = x.square().mean(-1, keepdim=True) + math.ulp(1.0)
    return x * square.rsqrt(), 0.5 * square.log()
