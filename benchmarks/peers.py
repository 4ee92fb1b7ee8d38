"""What our kernels are timed beside: one adapter each.

An adapter says which masks it can express; for any other its row says why it did not run. What it
imports, it imports when it is asked to prepare a call. ``prepare`` does whatever is generous to
leave outside the peer's time (transposed or repeated heads, a block mask's construction).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_cases import GpuCase
from benchmarks.gpu_inputs import BLOCK, Inputs, mask_of
from benchmarks.timing import Clock, Run
from dynmask import LifetimeMask

SDPA = torch.nn.functional.scaled_dot_product_attention
PREFILL = ("top_w", "streaming", "causal", "auto", "block", "structural")
EVERY = (*PREFILL, "decode")


@dataclass
class Prepared:
    """A call ready to be timed; it returns [b, h, q, d]. ``extra`` goes into its row."""

    run: Run
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Adapter:
    """One peer.

    Attributes:
        name: of the variant.
        masks: the masks that it can run.
        prepare: from a case's tensors to a call.
        pairs: "dense" (every causal pair), "same" (the case's mask, which the runner checks) or
            what it computes instead.
        lacks: why it does not run other masks.
        most_keys: the longest case that fits in memory; its row says so for longer ones.
    """

    name: str
    masks: tuple[str, ...]
    prepare: Callable[[Inputs], Prepared]
    pairs: str = "same"
    lacks: str = "not asked for"
    most_keys: int = 2**31

    def refuses(self, case: GpuCase) -> str:
        """Why this case is not run; empty when it is."""
        if case.mask not in self.masks:
            return self.lacks
        if case.keys > self.most_keys:
            return f"needs N x N memory: run at {self.most_keys:,} keys and below"
        return ""


# Dense attention of PyTorch


def _backend(name: str, device: torch.device) -> AbstractContextManager[Any]:
    """Only this backend of SDPA on a GPU; elsewhere what there is."""
    if device.type != "cuda":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(getattr(SDPBackend, name))


def _dense(backend: str) -> Callable[[Inputs], Prepared]:
    """SDPA by one backend, with its heads grouped or repeated beforehand: whichever is faster."""

    def prepare(data: Inputs) -> Prepared:
        def call(rows: int, times: int) -> Run:
            query, key, value = (x[:, :, :rows] for x in (data.query, data.key, data.value))
            if times > 1:
                key, value = (x.repeat_interleave(times, 1) for x in (key, value))
            grouped = key.shape[1] != query.shape[1]

            def run() -> Tensor:
                with _backend(backend, data.device):
                    return SDPA(query, key, value, is_causal=True, enable_gqa=grouped)

            return run

        times = _faster(lambda times: call(8192, times), (1, data.times), data.device)
        form = "grouped heads" if times == 1 else "heads repeated beforehand"
        return Prepared(call(data.case.keys, times), {"form": form})

    return prepare


def _faster(make: Callable[[int], Run], choices: tuple[int, ...], device: torch.device) -> int:
    """The choice whose call is faster; one that fails is out, and the last error is raised."""
    clock, seconds, error = Clock(device), {}, None
    for choice in dict.fromkeys(choices):
        try:
            run = make(choice)
            run()
            seconds[choice] = min(clock.time(run) for _ in range(3))
        except Exception as e:
            error = e
    if not seconds:
        assert error is not None
        raise error
    return min(seconds, key=lambda choice: seconds[choice])


def _default_sdpa(data: Inputs) -> Prepared:
    """SDPA as PyTorch runs it when nothing is said, heads grouped: as ``impl="auto"`` calls it."""
    causal = data.case.queries == data.case.keys
    grouped = data.times > 1
    return Prepared(
        lambda: SDPA(data.query, data.key, data.value, is_causal=causal, enable_gqa=grouped)
    )


def _folded_sdpa(data: Inputs) -> Prepared:
    """Dense decoding with the query heads of a group as rows: every key is read once for them."""
    case = data.case
    query = data.query.view(case.batch, case.groups, data.times, case.dim)
    return Prepared(lambda: SDPA(query, data.key, data.value).reshape(data.query.shape))


# FlexAttention


@cache
def _compiled_flex(compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention


def _flex(data: Inputs) -> Prepared:
    """FlexAttention with the same mask; the construction of its block mask is timed apart."""
    gpu = data.device.type == "cuda"
    build = (_flex_blocks if data.case.mask == "block" else _flex_top_w)(data)
    blocks = build()  # compiles
    seconds = Clock(data.device).time(build)
    attend, grouped = _compiled_flex(gpu), data.times > 1
    return Prepared(
        lambda: attend(data.query, data.key, data.value, block_mask=blocks, enable_gqa=grouped),
        {"mask_s": seconds},
    )


def _flex_top_w(data: Inputs) -> Run:
    """Makes the block mask of lifetimes, which the kernel reads for every pair."""
    from torch.nn.attention.flex_attention import create_block_mask

    mask = mask_of(data)
    assert isinstance(mask, LifetimeMask)
    death, times, n = mask.death[0].contiguous(), data.times, data.case.keys

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < death[h // times, k])

    compiled = data.device.type == "cuda"
    return lambda: create_block_mask(
        visible, 1, data.case.heads, n, n, data.device, _compile=compiled
    )


def _flex_blocks(data: Inputs) -> Run:
    """Makes the block mask of chosen blocks: those of the past are full, the own one is causal."""
    from torch.nn.attention.flex_attention import BlockMask

    table, gpu = data.given[0][0], data.device.type == "cuda"

    def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if gpu:
            return q >= k
        return (q >= k) & table[h, q // BLOCK, k // BLOCK]  # without a compiler, lists are ignored

    def build() -> BlockMask:
        chosen = data.given[0]
        blocks = torch.arange(chosen.shape[-1], device=data.device, dtype=torch.int32)
        past = chosen & (blocks < blocks[:, None])
        own = blocks[:, None].expand(chosen.shape).contiguous()  # only its first column is read
        return BlockMask.from_kv_blocks(
            torch.ones_like(own[..., 0]),
            own,
            past.sum(-1, dtype=torch.int32),
            past.int().argsort(dim=-1, descending=True, stable=True).int(),
            BLOCK_SIZE=BLOCK,
            mask_mod=causal,
            seq_lengths=(data.case.keys, data.case.keys),
        )

    return build


# Other projects


def _rows_first(*tensors: Tensor) -> list[Tensor]:
    """[b, n, heads, d], as most kernels want it."""
    return [x.transpose(1, 2).contiguous() for x in tensors]


def _repeated(data: Inputs) -> tuple[Tensor, Tensor]:
    """Keys and values with one head for each query head."""
    key, value = (x.repeat_interleave(data.times, 1) for x in (data.key, data.value))
    return key, value


STUBS = {
    "triton_kernels": (),
    "triton_kernels.matmul_ogs": ("matmul_ogs", "PrecisionConfig", "FlexCtx"),
    "triton_kernels.numerics": ("InFlexData", "OutFlexData"),
}
"""What flash-sparse-attn 2.0.6 imports for its projections, does not declare, and no package index
has. Its attention does not use them."""


def _stub_projections() -> bool:
    """Put empty names in place of the missing modules; says whether that was needed."""
    import sys
    from importlib import import_module
    from types import ModuleType

    try:
        import_module("triton_kernels.matmul_ogs")
        return False
    except ImportError:
        for name, members in STUBS.items():
            module = ModuleType(name)
            for member in members:
                setattr(module, member, None)
            sys.modules[name] = module
        return True


def _flash_sparse(data: Inputs) -> Prepared:
    """flash-sparse-attn: dense, or sinks and a window by its four window sizes per kv head."""
    stubbed = _stub_projections()
    from flash_sparse_attn.ops.triton.interface import flash_dense_attn_func

    query, key, value = _rows_first(data.query, data.key, data.value)
    windows, case = None, data.case
    if case.mask == "streaming":  # sinks, a far band (none), its gap, the newest keys
        row = torch.tensor([[case.sinks, 0, 0, case.width]], dtype=torch.int32)
        windows = row.expand(case.groups, 4).contiguous().to(data.device)

    def run() -> Tensor:
        out = flash_dense_attn_func(query, key, value, is_causal=True, window_sizes=windows)
        return out.transpose(1, 2)

    how = "its projections' missing requirement replaced by a stub; attention does not use it"
    return Prepared(run, {"how": how} if stubbed else {})


def _doge(data: Inputs) -> Prepared:
    """The dynamic mask of transformers' Doge layer, a dense float table, and SDPA with it.

    Its scores are a bias too, so its values differ from those of the bare mask.
    """
    from transformers.models.doge.modeling_doge import DogeAttention, repeat_kv

    n = data.case.keys
    scores = data.given[0].to(torch.bfloat16)
    causal = torch.ones(1, 1, n, n, dtype=torch.bool, device=data.device).tril_()
    key, value = _repeated(data)
    like = data.query[:, 0]  # the layer looks at its inputs for their length and dtype only

    def run() -> Tensor:
        mask = DogeAttention.prepare_dynamic_mask(
            SimpleNamespace(), like, scores, data.case.width, causal
        )
        return SDPA(data.query, key, value, attn_mask=repeat_kv(mask, data.times))

    return Prepared(run)


def _minference(data: Inputs) -> Prepared:
    """MInference's vertical-slash kernel, its index conversion inside the time as in its own use.

    A slash is a whole band of 64 x 64 blocks there, so it computes more pairs than the mask has.
    """
    from minference.ops.pit_sparse_flash_attention_v2 import vertical_slash_sparse_attention

    key, value = _repeated(data)
    diagonals, verticals = data.given
    return Prepared(
        lambda: vertical_slash_sparse_attention(data.query, key, value, verticals, diagonals)
    )


def _kvpress(data: Inputs) -> Prepared:
    """kvpress's head-wise masks: dense decoding after the masked keys were overwritten."""
    from kvpress.attention_patch import attention_patch

    def dense(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any) -> Tensor:
        return SDPA(query, key, value, enable_gqa=data.times > 1)

    index = data.plans[0].index.transpose(0, 1).long()  # [b, g, kept]
    masked = torch.ones(data.key.shape[:3], dtype=torch.bool, device=data.device)
    masked.scatter_(-1, index, False)
    layer = SimpleNamespace(masked_key_indices=masked.nonzero(as_tuple=True))
    key, attend = data.key.clone(), attention_patch(dense)
    return Prepared(lambda: attend(layer, data.query, key, data.value, None, 0.0))


def _nsa(data: Inputs) -> Prepared:
    """Selected blocks of native sparse attention, as many keys per query as our mask keeps.

    The op wants at least 16 query heads to a kv head, so two kv heads serve here; blocks are
    chosen at random, which costs it nothing.
    """
    from fla.ops.nsa import parallel_nsa

    size, case = 64, data.case
    groups = max(case.heads // 16, 1)
    query, key, value = _rows_first(data.query, data.key[:, :groups], data.value[:, :groups])
    kept = max(case.width // size, 1)
    last = torch.arange(case.keys, device=data.device) // size + 1
    chance = torch.rand(1, case.keys, groups, kept, device=data.device)
    blocks = (chance * last[:, None, None]).long().sort(-1).values
    return Prepared(
        lambda: parallel_nsa(
            query, key, value, block_indices=blocks, block_counts=kept, block_size=size
        ).transpose(1, 2),
        {"groups": groups},
    )


def _moba(data: Inputs) -> Prepared:
    """Mixture of block attention, as many keys per query as our mask keeps, by its own gate."""
    from fla.ops.moba import parallel_moba

    size, case = 128, data.case
    query, key, value = _rows_first(data.query, *_repeated(data))
    ends = torch.tensor([0, case.keys], dtype=torch.int32, device=data.device)
    top = max(case.width // size, 2)
    return Prepared(
        lambda: parallel_moba(query, key, value, ends, case.keys, size, top).transpose(1, 2)
    )


def _flashinfer(data: Inputs) -> Prepared:
    """FlashInfer's block sparse kernel, a list for each head; its plan is made beforehand.

    It has no causal rule inside a block, so the own block is read whole.
    """
    import flashinfer

    case, blocks = data.case, data.case.keys // BLOCK
    key, value = _repeated(data)
    space = torch.empty(2**28, dtype=torch.uint8, device=data.device)
    wrapper = flashinfer.VariableBlockSparseAttentionWrapper(space)
    sizes = torch.full((case.heads, blocks), BLOCK, dtype=torch.int32, device=data.device)
    wrapper.plan(
        data.given[0][0],
        sizes,
        sizes,
        case.heads,
        case.heads,
        case.dim,
        q_data_type=torch.bfloat16,
    )
    return Prepared(lambda: wrapper.run(data.query[0], key[0], value[0])[None])


def _seer(data: Inputs) -> Prepared:
    """SeerAttention is no package on the index: importing it is all that can be tried."""
    import seer_attn

    raise RuntimeError(f"seer_attn {seer_attn.__file__}: no kernel interface was checked")


OWN = {
    adapter.name: adapter
    for adapter in (
        Adapter("cudnn", PREFILL, _dense("CUDNN_ATTENTION"), "dense"),
        Adapter("fa2", PREFILL, _dense("FLASH_ATTENTION"), "dense"),
        Adapter("sdpa", EVERY, _default_sdpa, "dense"),
        Adapter("folded", ("decode",), _folded_sdpa, "dense"),
        Adapter("flex", ("top_w", "block"), _flex),
    )
}
"""What PyTorch brings along."""

PEERS = (
    Adapter(
        "flash-sparse-attn",
        ("streaming", "causal"),
        _flash_sparse,
        lacks="takes no list of keys: it skips tiles by a threshold on the softmax or on gates, "
        "and has windows and sinks",
    ),
    Adapter(
        "doge (transformers)",
        ("top_w",),
        _doge,
        "the same pairs, scores added as a bias",
        lacks="a dynamic mask of scores only",
        most_keys=8192,
    ),
    Adapter(
        "minference",
        ("structural",),
        _minference,
        "more pairs: a slash is a band of 64 x 64 blocks",
        lacks="vertical-slash patterns only",
    ),
    Adapter("kvpress", ("decode",), _kvpress, lacks="masks keys in decoding only"),
    Adapter(
        "fla nsa",
        ("top_w",),
        _nsa,
        "as many keys in random blocks of 64, with 2 kv heads: groups of at least 16",
        lacks="one list of blocks per query and kv head, no list per query block and head",
    ),
    Adapter(
        "fla moba",
        ("top_w",),
        _moba,
        "as many keys in blocks of 128 of its own choice",
        lacks="chooses its blocks itself",
    ),
    Adapter(
        "flashinfer",
        ("block",),
        _flashinfer,
        "the own block whole: no causal rule inside a block",
        lacks="lists of blocks only",
    ),
    Adapter("seerattention", EVERY, _seer),
)
"""Other projects' kernels, where they are installed."""


def adapters(case: GpuCase, peers: bool) -> list[Adapter]:
    """What a case is timed beside."""
    return [*(OWN[name] for name in case.variants), *(PEERS if peers and case.peers else ())]
