"""Up to which length is SDPA with the mask written out faster than our kernels on this GPU?

    python benchmarks/crossover.py [--out FOLDER] [--commit HASH]

A top-w mask of a quarter of the keys, lowering or writing out included, as a call of its own (the
host's launches inside) and with the device kept busy. ``DENSE_KEYS`` in ``attention.py`` is set by
the first; on a busy device our kernels take less of it at every length.
"""

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.headline import write_rows
from benchmarks.timing import COVER, Clock
from dynmask import LifetimeMask, attention
from dynmask.evals.provenance import machine

LENGTHS = (128, 256, 512, 1024, 2048, 4096)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=str(Path(__file__).parent / "results"))
    parser.add_argument("--commit", default=None, help="what is measured, where git cannot tell")
    args = parser.parse_args()
    device = torch.device("cuda")
    here, clock = machine(device), Clock(device)
    here["commit"] = args.commit or here["commit"]
    rows = []
    for keys in LENGTHS:
        query, key, value = (
            torch.randn(1, heads, keys, 128, device=device, dtype=torch.bfloat16)
            for heads in (32, 8, 8)
        )
        mask = LifetimeMask.top_w(torch.randn(1, 8, keys, device=device), keys // 4)
        for impl in ("triton", "sdpa"):
            run = partial(attention, query, key, value, mask, impl=impl)
            run()
            row = {"keys": keys, "impl": impl}
            for name, cover in (("call_s", 1), ("device_s", COVER)):
                row[name] = statistics.median(clock.time(run, cover=cover) for _ in range(11))
            rows.append({**row, **here})
            print(f"{keys:6d} {impl:7s} call {row['call_s'] * 1e3:.3f} ms, device "
                  f"{row['device_s'] * 1e3:.3f} ms", flush=True)  # fmt: skip
    write_rows(Path(args.out) / "crossover.jsonl", rows)


if __name__ == "__main__":
    main()
