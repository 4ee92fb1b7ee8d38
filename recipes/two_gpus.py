"""Several GPUs beside one: the same results, and how much faster a long prompt is read.

    python recipes/two_gpus.py                        # starts a process for each GPU; minutes
    python recipes/two_gpus.py --list                 # the stages, most important first
    python recipes/two_gpus.py --only gated tensor
    python recipes/two_gpus.py --smoke --out /tmp/trial   # toy sizes, two processes on the CPU
    torchrun --nproc-per-node 2 recipes/two_gpus.py --only equal

``gated``, ``vertical_slash`` and ``streaming`` read 262,144 tokens by a Llama-3.2-1B shape with
random weights, on one GPU and by context parallelism on all of them, in turn, choice, lowering and
gathering inside the time. ``equal`` compares context parallelism with one process, forward and
backward, ``tensor`` does the same for ``tp_plan="auto"`` and DTensors. ``dense`` is the model's
own attention (SDPA) on one GPU. ``streaming`` and ``dense`` run only where they are asked for.

Each stage has processes of its own: when one fails, the others of its stage are ended with a
message, and the next stage begins. Rows go to ``two_gpus.jsonl`` as soon as they are known and
replace those of the same case, variant and number of GPUs.
"""

from __future__ import annotations

import argparse
import gc
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "src"))
import dynmask
from benchmarks.generator import CARD, LLAMA_1B, RESULTS, TINY, Shape, wait
from benchmarks.headline import record, rows_of, write_rows
from dynmask import BlockMask, LifetimeMask, Mask, StructuralMask
from dynmask.distributed import Split, context_attention, context_parallel, gather
from dynmask.evals.memory import PeakMemory
from dynmask.evals.provenance import machine
from dynmask.policies import Elastic, Gated, Layer, Streaming, VerticalSlash
from dynmask.policies.base import Glancing
from recipes.million import QUARTER, policy_of

GOAL = 1.7
COMMAND = "python recipes/two_gpus.py"
SMALL = Shape("small", 1024, 2048, 2, 16, 8, 64, 1024)
ROUNDING = 2.0**-24  # of float32
STAGES = {"gated": 120, "equal": 240, "vertical_slash": 120, "tensor": 75, "streaming": 90,
          "dense": 120}  # fmt: skip
"""Seconds that each stage is given, most important first."""
ASKED = ("streaming", "dense")  # only by name
LEAST = 20  # seconds that are left for a stage to begin
END = 8  # seconds in which the others of a failed process may end by themselves

Row = dict[str, Any]


@dataclass(frozen=True)
class Rank:
    """One process of a stage.

    Attributes:
        index, ranks: its number and how many there are.
        device: its own.
        quiet: a group that waits on the CPU, so that no kernel spins on a GPU meanwhile.
        smoke: toy sizes.
        write: puts a row into the file; on the first process alone.
    """

    index: int
    ranks: int
    device: torch.device
    quiet: Any
    smoke: bool
    write: Callable[[Row], None]

    def barrier(self) -> None:
        dist.barrier(group=self.quiet)

    def most(self, value: float) -> float:
        """The largest of all processes' numbers."""
        found = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.quiet)
        return float(found)

    def every(self, value: Any) -> list[Any]:
        """What each process holds."""
        found: list[Any] = [None] * self.ranks
        dist.all_gather_object(found, value, group=self.quiet)
        return found

    def timed(self, run: Callable[[], Any], alone: bool = False) -> float:
        """Seconds until all processes, or the first alone, have done a thing."""
        self.barrier()
        if alone and self.index:
            self.barrier()
            return 0.0
        wait(self.device)
        started = time.perf_counter()
        run()
        wait(self.device)
        seconds = time.perf_counter() - started
        if alone:
            self.barrier()
            return seconds
        return self.most(seconds)


# ---------------------------------------------------------------------------------- how much faster


def speed(rank: Rank, variant: str, card: Path | None) -> None:
    """Read one prompt on one GPU and on all, in turn; a row each after every round."""
    shape, tokens, rounds = (TINY, 509, 2) if rank.smoke else (LLAMA_1B, QUARTER, 3)
    model = shape.model(rank.device, tokens + 1)
    policy, note = policy_of(variant, shape, card)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(shape.vocabulary, (1, tokens), generator=generator).to(rank.device)
    split = Split.over(None, tokens, balanced=True)
    own = split.take(ids, rank.index, 1)
    positions = split.positions(rank.index, rank.device)[None]
    last: dict[str, Tensor] = {}

    def one(run: Any) -> None:
        out = model(input_ids=ids, use_cache=False, logits_to_keep=1)
        last["one"] = out.logits

    def shared(run: Any) -> None:
        with context_parallel(run, split):
            out = model(input_ids=own, position_ids=positions, use_cache=False, logits_to_keep=1)
        last["all"] = out.logits

    base = {
        "case": f"{shape.name} {tokens:,}", "variant": variant, "keys": tokens, "policy": note,
        "weight_bytes": sum(x.nbytes for x in model.parameters()),
    }  # fmt: skip
    taken: dict[str, list[float]] = {"one": [], "all": []}
    peaks: dict[str, list[int]] = {}
    context: Any = nullcontext() if policy is None else dynmask.sparsify(model, policy)
    with context as run, torch.inference_mode():
        for turn in range(rounds + 1):
            for name, read in (("one", one), ("all", shared)):
                if name == "all" and policy is None:
                    continue
                with PeakMemory(rank.device) as peak:
                    seconds = rank.timed(lambda read=read: read(run), alone=name == "one")
                peaks[name] = rank.every(peak.bytes)
                if turn:  # the first compiles
                    taken[name].append(seconds)
                if turn and not rank.index:
                    rank.write(speed_row(base, name, taken, peaks[name], rank.ranks))
        if policy is None:
            return
        parts = shares_of(rank, policy, shape, split)
    if not rank.index:
        apart = None
        # the last position is the first process's, where pieces are balanced
        if "one" in last:
            apart = float((last["one"].float() - last["all"].float()).abs().max())
        row = speed_row(base, "all", taken, peaks["all"], rank.ranks)
        spread = float(last["one"].float().abs().max())
        rank.write(row | parts | {"logits_apart": apart, "logits_largest": spread})


def speed_row(
    base: Row, name: str, taken: dict[str, list[float]], peaks: list[int], ranks: int
) -> Row:
    """What is known of a prompt on one GPU or on all."""
    gpus = 1 if name == "one" else ranks
    seconds = taken[name]
    row = base | {"gpus": gpus, "seconds": seconds, "median_s": statistics.median(seconds)}
    row |= {"rounds": len(seconds), "tokens_per_s": base["keys"] / row["median_s"]}
    row["peak_beyond_weights_bytes"] = peaks[:gpus]
    if name == "all":
        row["speedup"] = statistics.median(taken["one"]) / row["median_s"]
        row["layout"] = "context parallel, balanced"
    return row


def shares_of(rank: Rank, policy: Any, shape: Shape, split: Split) -> Row:
    """Where a prompt's time cannot shrink: gathering, and the choice that every process makes.

    Measured alone, on random tensors of the layers' sizes, and added up over layers.
    """
    dtype = torch.bfloat16 if rank.device.type == "cuda" else torch.float32

    def drawn(heads: int, positions: int) -> Tensor:
        return torch.randn(1, heads, positions, shape.dim, device=rank.device, dtype=dtype)

    size = split.size(rank.index)
    own = [drawn(shape.groups, size) for _ in range(2)]
    query, glances = drawn(shape.heads, split.length), isinstance(policy, Glancing)
    if not glances or policy.rows_read(split.length, 0) is None:  # queries are gathered as well
        own.append(drawn(shape.heads, size))

    def gathered() -> list[Tensor]:
        return [gather(x, split) for x in own]

    key, value = gathered()[:2]
    seconds = min(rank.timed(gathered) for _ in range(3))

    def chosen() -> None:
        for index in range(shape.layers):
            policy(query, key, value, Layer(index))

    chosen()
    return {
        "gather_s": shape.layers * seconds,
        "gather_bytes": shape.layers * rank.ranks * sum(x.nbytes for x in own),
        "choice_s": min(rank.timed(chosen) for _ in range(3)),
    }


# --------------------------------------------------------------------------------- the same results


def masks(keys: int, heads: int, groups: int, device: torch.device) -> dict[str, Mask]:
    """A mask of each kind, drawn."""
    g = torch.Generator().manual_seed(2)
    scores = torch.randn(1, groups, keys, generator=g)
    draws = torch.randint(keys, (2, 1, heads, 48), generator=g).sort(-1).values.int()
    draws[0, ..., 0], draws[1, ..., 0] = 0, 0
    again = torch.zeros_like(draws, dtype=torch.bool)
    again[..., 1:] = draws[..., 1:] == draws[..., :-1]
    draws = draws.masked_fill(again, keys).sort(-1).values
    draws = draws.masked_fill(draws == keys, -1).to(device)
    blocks = -(-keys // 64)
    chosen = torch.rand(1, heads, blocks, blocks, generator=g) > 0.7
    chosen |= torch.eye(blocks, dtype=torch.bool)
    return {
        "lifetime": LifetimeMask.top_w(scores.to(device), 128),
        "structural": StructuralMask(draws[0], draws[1], keys),
        "block": BlockMask.from_scores(chosen.to(device), 64, 64, keys, keys),
    }


def equal(rank: Rank) -> None:
    """Context parallelism is one process: masks that are given, then models that choose."""
    wrong = [*compare_masks(rank, "context", in_context)]
    shape = TINY if rank.smoke else SMALL
    tokens = 203 if rank.smoke else 2_049
    model = shape.model(rank.device, tokens).double()
    ids = torch.randint(
        3, shape.vocabulary, (2, tokens), generator=torch.Generator().manual_seed(3)
    )
    for name, policy in choices(shape).items():
        row = model_row(rank, model, policy, ids.to(rank.device))
        wrong += report(rank, f"model {name} float64", row)
    refuse(wrong)


def report(rank: Rank, variant: str, row: Row) -> list[str]:
    """Write a comparison; its name where it failed on a process."""
    row["ranks_apart"] = rank.most(row["ranks_apart"])
    row["equal"] = row["ranks_apart"] <= row["tolerance"]
    if not rank.index:
        rank.write({"case": "equal to one process", "variant": variant, "gpus": rank.ranks, **row})
    return [] if row["equal"] else [variant]


def refuse(wrong: list[str]) -> None:
    """Raise RuntimeError where comparisons failed."""
    if wrong:
        raise RuntimeError(f"expected the results of one process, received others: {wrong}")


def compare_masks(
    rank: Rank, what: str, shared: Callable[..., tuple[list[Tensor], Callable[[Tensor], Tensor]]]
) -> Iterator[str]:
    """Outputs and gradients under given masks; the names of what differs.

    Several processes may be as far from float64 as one is, and a rounding of each result and of
    the sum of gradients more: three times one's own distance, in units of the largest number.

    Args:
        rank: the process.
        what: is compared.
        shared: from the process, the tensors and a mask, its own results and what takes as much
            of one process's.
    """
    keys, heads, groups, dim = (203, 4, 2, 16) if rank.smoke else (2_049, 16, 8, 64)
    for dtype in (torch.float32,) if rank.device.type == "cpu" else (torch.float32, torch.bfloat16):
        g = torch.Generator().manual_seed(4)
        shapes = [(1, n, keys, dim) for n in (heads, groups, groups, heads)]
        tensors = [torch.randn(*s, generator=g).to(rank.device, dtype) for s in shapes]
        for name, mask in masks(keys, heads, groups, rank.device).items():
            wide = [x.double() for x in tensors]
            truth = results(dynmask.attention, wide, mask, impl="reference")
            one = results(dynmask.attention, tensors, mask)
            found, cut = shared(rank, tensors, mask)
            of_one = furthest(one, truth, truth)
            apart = furthest(found, [cut(x) for x in truth], truth)
            row = {"ranks_apart": apart, "one_apart": of_one, "tolerance": 3 * of_one}
            kind = str(dtype).removeprefix("torch.")
            yield from report(rank, f"{what} {name} {kind}", row | {"against": "float64"})


def results(call: Callable[..., Any], given: list[Any], *how: Any, impl: str = "auto") -> list[Any]:
    """Output and gradients of a call, in float64."""
    q, k, v = (x.detach().clone().requires_grad_() for x in given[:3])
    out = call(q, k, v, *how, impl=impl)
    out.backward(given[3])
    return [x.detach().double() for x in (out, q.grad, k.grad, v.grad)]


def furthest(found: list[Tensor], truth: list[Tensor], whole: list[Tensor]) -> float:
    """The largest difference, in units of the largest number of each tensor."""
    return max(
        float((x - y).abs().max() / z.abs().max())
        for x, y, z in zip(found, truth, whole, strict=True)
    )


def in_context(rank: Rank, tensors: list[Tensor], mask: Mask) -> Any:
    """Attention of this process's positions."""
    split = Split.over(None, mask.keys, balanced=True)
    own = [split.take(x, rank.index) for x in tensors]
    found = results(context_attention, own, mask, split)
    return found, lambda x: split.take(x, rank.index)


def in_shards(rank: Rank, tensors: list[Tensor], mask: Mask) -> Any:
    """Attention of DTensors whose heads are shared."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh(rank.device.type, (rank.ranks,))
    own = [distribute_tensor(x, mesh, [Shard(1)]) for x in tensors]
    found = results(dynmask.attention, own, mask)
    return [x.full_tensor() for x in found], lambda x: x


def choices(shape: Shape) -> dict[str, Any]:
    """Policies of several kinds for a small model."""
    spans = tuple((1, 9, 130, 40)[i % 4] for i in range(shape.heads))
    return {
        "streaming": Streaming(sinks=2, window=40),
        "elastic": Elastic((spans,) * shape.layers, 0.1, 2, 4),
        "vertical_slash": VerticalSlash(verticals=40, slashes=60, last=16, sinks=2, window=8),
        "gated": Gated(sinks=2, window=24, columns=40, last=16),
        "gated blocks": Gated(sinks=2, window=24, columns=0, blocks=2, block=16, query_pool=4,
                              key_pool=4),
    }  # fmt: skip


def tolerance_of(truth: Tensor) -> float:
    """How far two orders of adding may lie apart in a float64 model whose norms are in float32.

    Each of a token's few norms may round its numbers to a neighbour: 64 roundings of the largest.
    """
    return 64 * ROUNDING * float(truth.abs().max())


def model_row(rank: Rank, model: Any, policy: Any, ids: Tensor) -> Row:
    """Logits and the gradients of all weights, against one process."""
    split = Split.over(None, ids.shape[1], balanced=True)
    weights = [x for x in model.parameters() if x.requires_grad]
    with dynmask.sparsify(model, policy, impl="reference") as run:  # kernels know no float64
        logits = model(ids, use_cache=False).logits
        target = torch.randn(logits.shape, dtype=logits.dtype, generator=torch.Generator()
                             .manual_seed(5)).to(ids.device)  # fmt: skip
        truth = torch.autograd.grad((logits * target).sum(), weights)
        with context_parallel(run, split):
            found = model(
                input_ids=split.take(ids, rank.index, 1),
                position_ids=split.positions(rank.index, ids.device)[None], use_cache=False,
            ).logits  # fmt: skip
            loss = (found * split.take(target, rank.index, 1)).sum()
            grads = torch.autograd.grad(loss, weights)
    logits, found = logits.detach(), found.detach()
    apart = [float((found - split.take(logits, rank.index, 1)).abs().max()) / tolerance_of(logits)]
    for grad, expected in zip(grads, truth, strict=True):
        dist.all_reduce(grad)
        apart.append(float((grad - expected).abs().max()) / tolerance_of(expected))
    return {"ranks_apart": max(apart), "tolerance": 1.0, "against": "one process, in tolerances",
            "compared": f"logits and {len(weights)} gradients"}  # fmt: skip


def tensor(rank: Rank) -> None:
    """``tp_plan="auto"``: logits and tokens of one process; attention of DTensors."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    shape = TINY if rank.smoke else SMALL
    if shape.groups % rank.ranks:
        raise RuntimeError(f"tensor: expected ranks that divide {shape.groups}, got {rank.ranks}")
    tokens = 61 if rank.smoke else 1_537
    ids = torch.randint(
        3, shape.vocabulary, (1, tokens), generator=torch.Generator().manual_seed(6)
    )
    ids = ids.to(rank.device)
    # one folder for all: the first process's
    with tempfile.TemporaryDirectory() as folder:
        folder = rank.every(folder)[0]
        if not rank.index:
            shape.model(torch.device("cpu"), tokens + 8).save_pretrained(folder)
        rank.barrier()
        load = AutoModelForCausalLM.from_pretrained
        one = load(folder, dtype=torch.float64).to(rank.device).eval()
        shared = DistributedConfig(tp_plan="auto")
        split = load(folder, dtype=torch.float64, distributed_config=shared).eval()
        rank.barrier()
    wrong: list[str] = []
    for name, policy in choices(shape).items():
        both = []
        for model in (one, split):
            with torch.no_grad(), dynmask.sparsify(model, policy, impl="reference"):
                logits = model(ids, use_cache=False).logits
                text = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
            both.append((logits, text))
        (truth, text), (found, same) = both
        row = {"ranks_apart": float((found - truth).abs().max()), "against": "one process",
               "tolerance": tolerance_of(truth), "compared": "logits and 4 tokens"}  # fmt: skip
        if not torch.equal(text, same):
            row["ranks_apart"] = float("inf")
        wrong += report(rank, f"tensor parallel {name} float64", row)
    refuse([*wrong, *compare_masks(rank, "dtensor", in_shards)])


# ------------------------------------------------------------------------------------ the processes


def run_stage(name: str, rank: Rank, card: Path | None) -> None:
    """One stage, on this process."""
    if name in ("equal", "tensor"):
        {"equal": equal, "tensor": tensor}[name](rank)
    else:
        speed(rank, name, card)


def as_rank(args: argparse.Namespace, stages: list[str]) -> int:
    """Be one process of some stages; the exit status."""
    index, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local = int(os.environ.get("LOCAL_RANK", index))
    gpu = torch.cuda.is_available() and not args.cpu
    device = torch.device(f"cuda:{local}" if gpu else "cpu")
    if gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    here = machine(device)
    here["commit"] = args.commit or here["commit"]
    try:
        how: dict[str, Any] = {"init_method": f"file://{args.meet}"} if args.meet else {}
        how |= {"device_id": device} if gpu else {}
        dist.init_process_group(
            "nccl" if gpu else "gloo", rank=index, world_size=ranks,
            timeout=timedelta(seconds=args.timeout), **how,
        )  # fmt: skip
        quiet = dist.new_group(backend="gloo", timeout=timedelta(seconds=args.timeout))
        rank = Rank(index, ranks, device, quiet, args.smoke, lambda row: put(row | here, args.out))
        for name in stages:
            run_stage(name, rank, args.card)
            gc.collect()
        rank.barrier()
        dist.destroy_process_group()
    except BaseException:  # whatever it is, the others must not wait for this process
        print(f"process {index} of {ranks}, {' '.join(stages)}:", file=sys.stderr)
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    return 0


def put(row: Row, out: Path) -> None:
    """Print a row and put it into the file."""
    file = out / "two_gpus.jsonl"
    name = ("case", "variant", "gpus")
    kept = [old for old in rows_of(file) if [old[x] for x in name] != [row[x] for x in name]]
    write_rows(file, [*kept, row])
    if "seconds" in row:
        peak = max(row["peak_beyond_weights_bytes"]) / 1e9
        more = f"  {row['speedup']:.2f}x" if "speedup" in row else ""
        if "gather_s" in row:
            more += f"  gathering {row['gather_s']:.3f} s, choice {row['choice_s']:.3f} s"
        text = f"{row['median_s']:8.3f} s  peak beyond weights {peak:.2f} GB{more}"
    else:
        apart, most = row["ranks_apart"], row["tolerance"]
        text = f"{'equal' if row['equal'] else 'DIFFERENT'}: {apart:.2e}, tolerance {most:.2e}"
    print(f"{row['case']:22s} {row['variant']:32s} on {row['gpus']}  {text}", flush=True)


@contextmanager
def processes(args: argparse.Namespace, stage: str, ranks: int) -> Iterator[list[Any]]:
    """The processes of a stage, all of them ended when it is left."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).resolve()), "--only", stage]
        command += ["--meet", f"{folder}/meet", "--out", str(args.out.resolve())]
        command += ["--timeout", str(args.timeout)]
        command += [f"--{name}" for name in ("smoke", "cpu") if getattr(args, name)]
        for name in ("commit", "card"):
            if getattr(args, name):
                command += [f"--{name}", str(getattr(args, name))]
        started: list[Any] = []
        try:
            for index in range(ranks):
                own = {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(ranks)}
                environment = {"TOKENIZERS_PARALLELISM": "false", **os.environ, **own}
                environment.setdefault("OMP_NUM_THREADS", "4" if torch.cuda.is_available() else "1")
                if "lo" in (name for _, name in socket.if_nameindex()):  # all on this machine
                    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
                started.append(subprocess.Popen(command, env=environment))
            yield started
        finally:
            for process in started:
                if process.poll() is None:
                    process.kill()
            for process in started:
                process.wait()


def watch(started: list[Any], until: float) -> str:
    """Wait for a stage's processes; what went wrong, or nothing."""
    failed_at = 0.0
    while any(process.poll() is None for process in started):
        now = time.monotonic()
        if now > until:
            return "out of time"
        if failed_at and now > failed_at + END:
            break
        if not failed_at and any(process.poll() for process in started):
            failed_at = now
        time.sleep(0.1)
    failed = [i for i, process in enumerate(started) if process.poll() not in (0, None)]
    return f"failed in process {failed[0]}, see above" if failed else ""


def goals(out: Path, commit: str | None) -> None:
    """Headline rows of what this commit measured on GPUs."""
    for row in rows_of(out / "two_gpus.jsonl"):
        if row["gpus"] == 1 or "speedup" not in row or row["device"]["type"] != "cuda":
            continue
        if row["commit"] != (commit or machine(torch.device("cuda"))["commit"]):
            continue
        parts = ""
        if "gather_s" in row:
            parts = (f"; gathering alone {row['gather_s']:.2f} s, the choice on every GPU "
                     f"{row['choice_s']:.2f} s")  # fmt: skip
        made = record(
            5, f"{row['case']} tokens, context-parallel prefill on {row['gpus']} GPUs, "
            f"{row['variant']}, against one", "speedup", round(row["speedup"], 4),
            GOAL * row["gpus"] / 2, "higher", torch.device("cuda"),
            f"{row['median_s']:.2f} s, median of {row['rounds']}; {row['policy']}{parts}", COMMAND,
            row, out / "headline.jsonl",
        )  # fmt: skip
        print(f"  {'met' if made['met'] else 'MISSED'}: {made['goal']}: {made['value']:.3g}")


def main(argv: list[str] | None = None) -> int:
    """Run stages; 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--ranks", type=int, help="processes (default: one for each GPU)")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="stages by name, see --list")
    parser.add_argument("--list", action="store_true", help="names of the stages, then stop")
    parser.add_argument("--smoke", action="store_true", help="toy sizes: does it run through?")
    parser.add_argument("--cpu", action="store_true", help="gloo on the CPU where there are GPUs")
    parser.add_argument("--minutes", type=float, default=4.0, help="no stage goes on after so many")
    parser.add_argument(
        "--timeout", type=int, default=110, help="seconds a process waits for others"
    )
    parser.add_argument("--card", type=Path, help="card of gates (default: models', if there)")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--meet", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.list:
        print("\n".join(STAGES))
        return 0
    wrong = sorted(set(args.only or ()) - STAGES.keys())
    if wrong:
        parser.error(f"--only: expected some of {', '.join(STAGES)}, received {wrong[0]}")
    stages = args.only or [name for name in STAGES if name not in ASKED]
    args.card = args.card or (CARD if CARD.is_dir() else None)
    if "RANK" in os.environ:
        return as_rank(args, stages)
    gpus = 0 if args.cpu else torch.cuda.device_count()
    ranks = args.ranks or gpus or 2
    if (ranks > gpus) if gpus else not args.smoke:
        parser.error(
            f"--ranks: expected a GPU for each of {ranks} processes, received {gpus}; "
            "--smoke runs toy sizes on the CPU"
        )
    ends, failures = time.monotonic() + 60 * args.minutes, []
    for name in stages:
        left = ends - time.monotonic()
        if left < LEAST:
            failures.append(f"{name}: not begun, --minutes {args.minutes:g} are over")
            continue
        with processes(args, name, ranks) as started:
            problem = watch(started, time.monotonic() + min(STAGES[name], left))
        if problem:
            failures.append(f"{name}: {problem}")
            print(failures[-1], file=sys.stderr, flush=True)
    if gpus and not args.smoke:
        goals(args.out, args.commit)
    print("\n".join(failures) or "every stage ran through", flush=True)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
