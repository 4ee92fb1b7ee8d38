"""A small decoder whose mixer alone differs between the models of a comparison."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import asdict, dataclass
from typing import Any

import dma_common  # noqa: F401 (finds dynmask)
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmask import LifetimeMask, attention
from dynmask.nn import DynamicMaskAttention, collect_retention_loss
from dynmask.scores import Form

MIXERS = ("full", "window", "dma", "nsa", "mla")


@dataclass(frozen=True)
class Shape:
    """A decoder: width, depth, heads, and which mixer reads how many keys.

    ``width`` is the keys a query reads (window, DMA, NSA). NSA's 16 query heads share one kv head,
    which its kernels ask for; half of the keys are a window, ``selected`` are those of the blocks
    it chooses (0: the other half, and 16 numbers or a sixteenth of the model width a head instead
    of ``head_dim``). The first block and the last two are always among them. MLA keeps a latent of
    ``latent`` numbers a token and a key of ``rotary`` that carries the position (0: half of
    ``head_dim``). ``shifts`` is how many tokens before its own the input of every mixer sums up,
    each weighted by channel (a short convolution); 0 leaves it out.
    """

    mixer: str
    vocabulary: int
    hidden: int = 64
    layers: int = 2
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 64
    intermediate: int = 128
    width: int = 512
    window: int = 128
    sinks: int = 4
    form: Form = "bounded"
    retention_weight: float = 0.05
    start: float = 1.0  # of A
    retention_rows: int = 48
    retention_after: int = 128
    selected: int = 0
    latent: int = 64
    rotary: int = 0
    rope_theta: float = 1e5
    shifts: int = 0

    def __post_init__(self) -> None:
        if self.mixer not in MIXERS:
            raise ValueError(f"mixer: expected one of {MIXERS}, received {self.mixer!r}")


class Attention(nn.Module):
    """Causal attention over all keys, or over a sliding window of the newest ones."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        inner = shape.heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, inner, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(inner, shape.hidden, bias=False)

    def forward(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, None]:
        """Mix x [b, n, hidden]."""
        dim, n = self.shape.head_dim, x.shape[1]
        q, k, v = (
            proj(x).unflatten(-1, (-1, dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = (part[:, None].to(q.dtype) for part in position_embeddings)
        q, k = (rotate(part, cos, sin) for part in (q, k))
        if self.shape.mixer == "full" or n <= self.shape.width:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            out = attention(q, k, v, LifetimeMask.window(n, self.shape.width, device=x.device))
        return self.o_proj(out.transpose(1, 2).flatten(-2)), None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate halves of the last dimension against each other (RoPE)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def rotary_tables(
    positions: Tensor, dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [..., dim] of positions [...], exact up to millions.

    Angles are float64 and reduced before the cast: float32 leaves 0.06 rad of a position of 2^20.
    """
    powers = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float64) / dim
    angles = positions.double()[..., None] * theta**-powers
    angles = torch.remainder(angles, 2 * math.pi).float()
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple[int, int]) -> Tensor:
    """What fla's layers ask of the flash_attn package, which needs a compiler to install.

    Tensors are [b, n, heads, d]; ``window_size`` counts the keys before a query, -1 is all.
    """
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    if window_size[0] < 0 or window_size[0] >= k.shape[2] - 1:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    else:
        out = attention(
            q, k, v, LifetimeMask.window(k.shape[2], window_size[0] + 1, device=q.device)
        )
    return out.transpose(1, 2)


def new_mixer(shape: Shape, index: int) -> nn.Module:
    """Return the attention layer of a shape.

    Raises:
        ImportError: flash-linear-attention is missing (NSA and MLA).
    """
    if shape.mixer in ("full", "window"):
        return Attention(shape)
    if shape.mixer == "dma":
        layer = DynamicMaskAttention(
            shape.hidden, shape.heads, shape.kv_heads, shape.head_dim, width=shape.width,
            window=shape.window, sinks=shape.sinks, form=shape.form,
            retention_weight=shape.retention_weight, retention_rows=shape.retention_rows,
            retention_after=shape.retention_after, layer_idx=index,
        )  # fmt: skip
        nn.init.constant_(layer.score.A, shape.start)
        return layer
    if importlib.util.find_spec("fla") is None:
        raise ImportError(
            f"mixer {shape.mixer!r}: expected flash-linear-attention, found none; "
            "pip install flash-linear-attention"
        )
    if shape.mixer == "nsa":
        from fla.layers import NativeSparseAttention
        from fla.ops.nsa import parallel

        if parallel.flash_attn_func is None:
            parallel.flash_attn_func = _flash
        # its kernels want half as many blocks as a block has keys at most
        selected = shape.selected or shape.width // 2
        block = 16 if selected // 16 <= 8 else 32
        return NativeSparseAttention(
            hidden_size=shape.hidden, num_heads=16, num_kv_heads=1,
            head_dim=shape.head_dim if shape.selected else max(16, shape.hidden // 16),
            block_size=block, block_counts=max(1, selected // block),
            window_size=shape.width // 2, rope_theta=shape.rope_theta, layer_idx=index,
        )  # fmt: skip
    from fla.layers import mla

    if mla.flash_attn_func is None:
        mla.flash_attn_func = _flash
    rotary = shape.rotary or shape.head_dim // 2
    return mla.MultiheadLatentAttention(
        hidden_size=shape.hidden, num_heads=shape.heads, q_lora_rank=None,
        qk_rope_head_dim=rotary, qk_nope_head_dim=shape.head_dim - rotary,
        qk_head_dim=shape.head_dim, v_head_dim=shape.head_dim, kv_lora_rank=shape.latent,
        rope_theta=shape.rope_theta, layer_idx=index,
    )  # fmt: skip


def _normed(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6).to(dtype)


def _feed(
    x: Tensor, mixed: Tensor, norm: Tensor, opened: Tensor, closed: Tensor, dtype: torch.dtype
) -> Tensor:
    """The residual stream after what was mixed and SwiGLU."""
    x = x + mixed
    gate, up = F.linear(_normed(x, norm, dtype), opened.to(dtype)).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, closed.to(dtype))


def _short_convolution(y: Tensor, weight: Tensor) -> Tensor:
    """y [b, n, c] and the tokens before it, weighted by ``weight`` [tokens before, c]."""
    n = y.shape[1]
    out = y
    for i, w in enumerate(weight.to(y.dtype), 1):
        out = out + F.pad(y, (0, 0, i, 0))[:, :n] * w
    return out


class Decoder(nn.Module):
    """A pre-norm decoder, SwiGLU, tied embeddings, fan-in initialisation.

    The mixer alone differs between the models of a comparison.
    """

    def __init__(self, shape: Shape, compiled: bool = False) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocabulary, shape.hidden)
        self.mixers = nn.ModuleList([new_mixer(shape, i) for i in range(shape.layers)])
        ones = [nn.Parameter(torch.ones(shape.hidden)) for _ in range(2 * shape.layers + 1)]
        self.norms = nn.ParameterList(ones)
        self.opened = nn.ParameterList(
            [nn.Parameter(torch.empty(2 * shape.intermediate, shape.hidden))
             for _ in range(shape.layers)])  # fmt: skip
        self.closed = nn.ParameterList(
            [nn.Parameter(torch.empty(shape.hidden, shape.intermediate))
             for _ in range(shape.layers)])  # fmt: skip
        self.before = nn.ParameterList(
            [nn.Parameter(torch.empty(shape.shifts, shape.hidden)) for _ in self.mixers]
            if shape.shifts else [])  # fmt: skip
        self.feed = torch.compile(_feed) if compiled else _feed
        for name, weight in self.named_parameters():
            if weight.dim() < 2 or ".score." in name:
                continue
            scale = 0.5 if name.startswith("before.") else weight.shape[1] ** -0.5
            if "closed" in name or "o_proj" in name:
                scale /= math.sqrt(2 * shape.layers)
            nn.init.normal_(weight, std=scale)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the normed hidden states [b, n, hidden] of ids [b, n]."""
        x = self.embed(ids)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        where = torch.arange(ids.shape[1], device=ids.device)[None]
        tables = rotary_tables(where, self.shape.head_dim, self.shape.rope_theta, dtype)
        for index, mixer in enumerate(self.mixers):
            y = _normed(x, self.norms[2 * index], dtype)
            if self.shape.shifts:
                y = _short_convolution(y, self.before[index])
            if self.shape.mixer in ("nsa", "mla"):
                mixed = mixer(y, attention_mask=None)[0]
            else:
                mixed = mixer(y, position_embeddings=tables)[0]
            weights = self.norms[2 * index + 1], self.opened[index], self.closed[index]
            x = self.feed(x, mixed, *weights, dtype)
        return _normed(x, self.norms[-1], dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits of hidden states."""
        return F.linear(hidden, self.embed.weight.to(hidden.dtype)).float()

    def retention_loss(self) -> Tensor | float:
        """Return the weighted retention loss of the last forward; 0 where there is none."""
        if self.shape.mixer != "dma" or not self.shape.retention_weight:
            return 0.0
        return collect_retention_loss(self)


def describe(model: nn.Module) -> dict[str, Any]:
    """Return shape and number of parameters of a decoder, for its row."""
    return {"shape": asdict(model.shape), "parameters": sum(p.numel() for p in model.parameters())}
