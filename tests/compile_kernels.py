"""Compile the Triton kernels for Hopper without a GPU; run by test_triton_compile.py.

Prints one JSON line for each: registers are the compiler's business, shared memory decides how
many programs fit on a multiprocessor.
"""

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dynmask.kernels.triton import decode, lower, prefill, select
from dynmask.kernels.triton.prefill import config_of

HOPPER = GPUTarget("cuda", 90, 32)
FLOATS = ("Bias", "Lse", "PartOut", "PartTop", "PartSum")
TENSORS = ("Q", "K", "V", "Out")


def compile_kernel(name, kernel, constants, dtype="bf16", options=None):
    """Compile with 32-bit integers, every pointer aligned to 16 bytes."""
    signature, aligned = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in TENSORS:
            signature[argument] = f"*{dtype}"
        elif argument in FLOATS:
            signature[argument] = "*fp32"
        elif argument[0].isupper() or argument in POINTERS:
            signature[argument] = "*i64" if argument == "order" else "*i32"
        elif argument in ("chosen", "is_vertical"):
            signature[argument] = "*u8"
        else:
            signature[argument] = "fp32" if argument == "factor" else "i32"
        if signature[argument].startswith("*") or argument in ("q_n", "k_n", "v_n", "o_n"):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    built = triton.compile(source, target=HOPPER, options=options or {"num_warps": 4})
    line = {"kernel": name, "shared": built.metadata.shared, "wgmma": "wgmma" in built.asm["ptx"]}
    print(json.dumps(line), flush=True)


POINTERS = (
    "order", "rank", "table", "border", "death", "bracket", "counts", "index", "ends", "parent",
    "parent_ends", "parent_count", "full", "count", "numbers", "position", "rows", "offset",
    "words", "found_at", "vertical", "bits",
)  # fmt: skip


def prefill_kernel(name, rule, tile=64, dim=128, block=1, dtype="bf16", **more):
    """Prefill as attention() runs it."""
    size = 4 if dtype == "fp32" else 2
    config = config_of(dim, size, tile, rule)
    pad = triton.next_power_of_2(dim)
    constants = {
        "MEMBERS": 4, "PACK": max(config.rows // tile, 1), "TILE": tile, "STEP": config.step,
        "D": dim, "DV": dim, "D_PAD": pad, "DV_PAD": pad, "BLOCK": block, "RULE": rule,
        "WORDS": -(-tile // 32), "HAS_BIAS": False, "HAS_LSE": False, "ORDERED": False,
        "WIDE": False, "UPCAST": False, "PRECISION": "ieee" if size == 4 else "tf32",
        "STAGES": config.stages, "EDGE_STAGES": config.stages if rule == "bits" else 1,
        **more,
    }  # fmt: skip
    options = {"num_warps": config.warps, "maxnreg": config.registers}
    compile_kernel(name, prefill._prefill_kernel, constants, dtype, options)


def main():
    prefill_kernel("prefill lists", "death")
    prefill_kernel("prefill blocks", "causal", tile=128, block=128)
    prefill_kernel("prefill bits", "bits")
    prefill_kernel(
        "prefill everything", "death", dim=80, block=16, HAS_BIAS=True, HAS_LSE=True, WIDE=True
    )
    prefill_kernel("prefill float32", "death", dtype="fp32")
    prefill_kernel("prefill dim 256", "bits", dim=256)
    compile_kernel(
        "decode parts",
        decode._split_kernel,
        {
            "MEMBERS": 4, "PACK": 16, "STEP": 64, "SPLITS": 4, "D": 128, "DV": 128, "D_PAD": 128,
            "DV_PAD": 128, "BLOCK": 1, "RULE": "causal", "HAS_BIAS": False, "UPCAST": False,
            "PRECISION": "tf32", "STAGES": 4,
        },
    )  # fmt: skip
    merge = {"SPLITS": 3, "SPLITS_PAD": 4, "DV": 128, "DV_PAD": 128, "HAS_LSE": True}
    compile_kernel("decode merge", decode._merge_kernel, merge)
    chunk = {"CHUNK": select.CHUNK}
    compile_kernel("table", select._table_kernel, {"BUCKET": 256, "BINS": 256, **chunk})
    compile_kernel("boundary", select._boundary_kernel, {"BUCKET": 256, "BUCKETS": 128, **chunk})
    compile_kernel("deaths", select._death_kernel, {"WALK": 1024, "ROWS": 16, **chunk})
    for write in (False, True):
        compile_kernel("segments", lower._segment_kernel, {"BLOCK": 1024, "WRITE": write})
        compile_kernel("filter", lower._filter_kernel, {"BLOCK": 1024, "FINAL": write})
    sizes = {"BLOCK_Q": 128, "BLOCK_K": 128, "BLOCK": 1024}
    compile_kernel("block lists", lower._block_kernel, sizes)
    compile_kernel("block plan", lower._block_plan_kernel, sizes)
    patterns = {"WORDS": 2, "BLOCK": 1024, "BLOCK_V": 32}
    compile_kernel("patterns", lower._pattern_kernel, patterns)


if __name__ == "__main__":
    main()
