"""Compile the Triton kernels for Hopper without a GPU; run by test_triton_compile.py.

Prints one JSON line for each: registers are the compiler's business, shared memory decides how
many programs fit on a multiprocessor.
"""

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dynmask.kernels.triton import backward, decode, lower, patterns, prefill, select, worth
from dynmask.kernels.triton.prefill import config_of

HOPPER = GPUTarget("cuda", 90, 32)
FLOATS = (
    "Bias", "Lse", "PartOut", "PartTop", "PartSum", "LseSlope", "Delta", "KeyGrad", "ValueGrad",
    "BiasGrad", "Top", "Sum", "Kept", "Norm", "Worth",
)  # fmt: skip
TENSORS = ("Q", "K", "V", "Out", "Slope", "QueryGrad")


def compile_kernel(name, kernel, constants, dtype="bf16", options=None):
    """Compile with 32-bit integers, every pointer and row of a tensor aligned to 16 bytes."""
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
        elif argument in ("chosen", "is_vertical", "marks"):
            signature[argument] = "*u8"
        else:
            signature[argument] = "fp32" if argument in ("factor", "scale") else "i32"
        if signature[argument].startswith("*") or argument in STRIDES:
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    built = triton.compile(source, target=HOPPER, options=options or {"num_warps": 4})
    line = {"kernel": name, "shared": built.metadata.shared, "wgmma": "wgmma" in built.asm["ptx"]}
    print(json.dumps(line), flush=True)


STRIDES = tuple(f"{tensor}_{axis}" for tensor in ("q", "k", "v", "o", "s", "qg") for axis in "bhn")
POINTERS = (
    "order", "rank", "table", "border", "death", "bracket", "counts", "index", "ends", "parent",
    "parent_ends", "parent_count", "full", "count", "numbers", "position", "rows", "offset",
    "words", "whole_at", "found_at", "vertical", "bits", "diagonal", "column", "whole", "found",
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


def backward_kernels(name, rule, tile=64, dim=128, block=1, dtype="bf16", **more):
    """Both kernels of the backward as attention() runs them."""
    size = 4 if dtype == "fp32" else 2
    rows = backward.row_config_of(dim, size, 4 * tile)
    keys = backward.key_config_of(dim, size, more.get("HAS_BIAS", False))
    pad, part = triton.next_power_of_2(dim), min(tile, rows.rows)
    constants = {
        "MEMBERS": 4, "D": dim, "DV": dim, "D_PAD": pad, "DV_PAD": pad, "BLOCK": block,
        "RULE": rule, "WORDS": -(-tile // 32), "HAS_BIAS": False, "WIDE": False, "UPCAST": False,
        "PRECISION": "tf32x3" if size == 4 else "tf32", **more,
    }  # fmt: skip
    own = {
        "PACK": min(rows.rows // part, 4), "PART": part, "PARTS": tile // part, "STEP": rows.step,
        "HAS_LSE_SLOPE": False, "STAGES": rows.stages,
        "EDGE_STAGES": rows.stages if rule == "bits" else 1,
    }  # fmt: skip
    options = {"num_warps": rows.warps, "maxnreg": rows.registers}
    compile_kernel(f"rows {name}", backward._row_kernel, {**constants, **own}, dtype, options)
    own = {"CHUNK": keys.chunk, "STEP": keys.step, "STAGES": keys.stages, "ATOMIC": True}
    options = {"num_warps": keys.warps, "maxnreg": keys.registers}
    compile_kernel(f"keys {name}", backward._key_kernel, {**constants, **own}, dtype, options)


def main():
    prefill_kernel("prefill lists", "death")
    prefill_kernel("prefill blocks", "causal", tile=128, block=128)
    prefill_kernel("prefill bits", "bits")
    prefill_kernel(
        "prefill everything", "death", dim=80, block=16, HAS_BIAS=True, HAS_LSE=True, WIDE=True
    )
    prefill_kernel("prefill float32", "death", dtype="fp32")
    prefill_kernel("prefill dim 256", "bits", dim=256)
    backward_kernels("backward lists", "death")
    backward_kernels("backward everything", "death", dim=80, block=16, HAS_BIAS=True, WIDE=True)
    backward_kernels("backward bits", "bits", dim=64)
    backward_kernels("backward dim 256", "causal", dim=256, block=128)
    backward_kernels("backward float32", "death", dtype="fp32")
    for splits in (1, 4, 33):
        compile_kernel(
            f"decode {splits} splits",
            decode._decode_kernel,
            {
                "MEMBERS": 4, "PACK": 16, "STEP": 64, "SPLITS": splits, "D": 128, "DV": 128,
                "D_PAD": 128, "DV_PAD": 128, "BLOCK": 1, "RULE": "causal", "HAS_BIAS": False,
                "HAS_LSE": True, "UPCAST": False, "PRECISION": "tf32", "STAGES": 4,
            },
        )  # fmt: skip
    for rows, pack in ((64, 1), (1, 16)):
        sizes = {
            "D": 128, "D_PAD": 128, "TILE": rows, "PACK": pack, "STEP": worth.STEP,
            "UPCAST": False, "PRECISION": "tf32", "WIDE": False,
        }  # fmt: skip
        compile_kernel(f"sums of {rows} rows", worth._sum_kernel, sizes)
        compile_kernel(f"worth to {rows} rows", worth._worth_kernel, sizes)
    compile_kernel("kept", worth._kept_kernel, {**sizes, "TILE": 16, "PACK": 1})
    chunk = {"CHUNK": select.CHUNK}
    compile_kernel("table", select._table_kernel, {"BUCKET": 2048, "BINS": 2048, **chunk})
    compile_kernel("boundary", select._boundary_kernel, {"BUCKET": 256, "BUCKETS": 128, **chunk})
    compile_kernel("deaths", select._death_kernel, {"WALK": 1024, "ROWS": 16, **chunk})
    for write in (False, True):
        compile_kernel("segments", lower._segment_kernel, {"BLOCK": 1024, "WRITE": write})
        compile_kernel("filter", lower._filter_kernel, {"BLOCK": 512, "FINAL": write})
    sizes = {"BLOCK_Q": 128, "BLOCK_K": 128, "BLOCK": 1024}
    compile_kernel("block lists", lower._block_kernel, sizes)
    compile_kernel("block plan", lower._block_plan_kernel, sizes)
    sizes = {"WORDS": 2, "BLOCK": 1024, "BLOCK_V": 32}
    compile_kernel("patterns", patterns._pattern_kernel, sizes)
    compile_kernel("marks", patterns._mark_kernel, {"BLOCK": 256})
    compile_kernel("offsets", patterns._offset_kernel, {"BLOCK": 1024})
    compile_kernel("row words", patterns._row_words_kernel, {"WORDS": 2, "BLOCK": 128})


if __name__ == "__main__":
    main()
