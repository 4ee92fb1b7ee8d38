"""What the DMA recipes share: a training loop that resumes, and rows of results.

The loop is seeded by (seed, step) at every step, so that a killed run goes on as if nothing had
happened: its checkpoint needs weights, moments and the number of the step, nothing else. Under
``accelerate launch`` it runs on several GPUs; without accelerate it runs on one.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "recipes"), str(ROOT), str(ROOT / "src")]

import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

from dynmask.evals.provenance import machine  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


# ------------------------------------------------------------------------------------- the results


def seed_of(*parts: object) -> int:
    """Return a seed of 48 bits that is the same for the same parts everywhere."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=6).digest(), "big")


def provenance(device: torch.device | str, commit: str | None) -> dict[str, Any]:
    """Return date, commit, versions and device of a row; ``commit`` where git cannot tell."""
    here = machine(torch.device(device))
    return {**here, "commit": commit or here["commit"]}


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append one JSON line in a single write, so that processes beside each other may do so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(row) + "\n").encode()
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line)
    finally:
        os.close(file)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSONL file; none if there is no file, and no line that was cut off."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def with_settings(config: Any, settings: Iterable[str]) -> Any:
    """Return a dataclass with fields replaced from ``name=value`` words, the value as JSON."""
    names = {item.name for item in fields(config)}
    changed: dict[str, Any] = {}
    for word in settings:
        name, _, text = word.partition("=")
        if name not in names:
            raise ValueError(
                f"--set: expected a field of {type(config).__name__}, received {name!r}; "
                f"choose one of {', '.join(sorted(names))}"
            )
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        if isinstance(value, list):
            value = tuple(tuple(part) if isinstance(part, list) else part for part in value)
        changed[name] = value
    return replace(config, **changed)


def in_parallel(commands: Sequence[list[str]], logs: Sequence[Path], jobs: int) -> list[int]:
    """Run commands beside each other, ``jobs`` at a time, on the visible GPUs in turn.

    Returns:
        The exit status of each; its output goes to its log.
    """
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = visible.split(",") if visible else [str(index) for index in range(count)]
    waiting = list(range(len(commands)))
    running: dict[int, subprocess.Popen[bytes]] = {}
    codes: dict[int, int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                index = waiting.pop(0)
                environment = dict(os.environ)
                if devices:
                    environment["CUDA_VISIBLE_DEVICES"] = devices[index % len(devices)]
                logs[index].parent.mkdir(parents=True, exist_ok=True)
                with open(logs[index], "wb") as log:
                    running[index] = subprocess.Popen(
                        commands[index], stdout=log, stderr=subprocess.STDOUT, env=environment
                    )
            for index, process in list(running.items()):
                code = process.poll()
                if code is not None:
                    codes[index] = code
                    del running[index]
            time.sleep(0.2)
    finally:
        for process in running.values():
            process.terminate()
    return [codes[index] for index in range(len(commands))]


_device = "cpu"


def _begin(counter: Any, devices: int) -> None:
    """Give a worker its GPU, in turn."""
    global _device
    torch.set_num_threads(1)
    with counter.get_lock():
        index = counter.value
        counter.value += 1
    if devices:
        _device = f"cuda:{index % devices}"
        torch.cuda.set_device(index % devices)


def _run(work: Any, cell: Any, until: float, commit: str | None) -> dict[str, Any] | None:
    """Run a cell in a worker; the row of one that cannot run says why."""
    if time.time() > until:
        return None
    try:
        found = work(cell, _device, until)
    except Exception as error:  # also whatever a kernel of another library raises
        found = {"error": f"{type(error).__name__}: {error}"[:300]}
    told = {name: value for name, value in asdict(cell).items() if name != "folder"}
    about = {**told, **provenance(_device, commit)}
    return None if found is None else {"key": cell.key, **about, **found}


def run_cells(
    cells_of: Callable[[list[dict[str, Any]]], list[Any]],
    work: Callable[[Any, str, float], dict[str, Any] | None],
    name: str,
    results: Path,
    minutes: float,
    jobs: int,
    commit: str | None,
) -> None:
    """Run the cells of a table in worker processes, on the visible GPUs in turn.

    Args:
        cells_of: from the rows so far, the cells that have none and can run, important ones first.
        work: runs a cell on a device and returns its numbers, ``says`` among them; None when it
            had to stop at a time of day (seconds) before its end.
        name: of the recipe.
        results: the file of rows; cells with a row are not run again.
        minutes: after so many no cell begins.
        jobs: cells beside each other.
        commit: what is run, where git cannot tell.
    """
    until, devices = time.time() + 60 * minutes, torch.cuda.device_count()
    old = len(read_rows(results))  # what failed before may run today
    context = multiprocessing.get_context("spawn")
    running: dict[Future[Any], Any] = {}
    with ProcessPoolExecutor(
        jobs, context, initializer=_begin, initargs=(context.Value("i", 0), devices)
    ) as pool:
        while True:
            rows = enumerate(read_rows(results))
            cells = cells_of([row for i, row in rows if i >= old or "error" not in row])
            busy = {cell.key for cell in running.values()}
            for cell in [cell for cell in cells if cell.key not in busy][: jobs - len(running)]:
                if time.time() < until:
                    running[pool.submit(_run, work, cell, until, commit)] = cell
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell, row = running.pop(future), future.result()
                if row is not None:
                    append_row(results, {"recipe": name, **row})
                    print(f"{cell}: {row.get('error') or row['says']}", flush=True)


# ---------------------------------------------------------------------------------------- the loop


class Ranks:
    """The processes of a run: accelerate's where it is installed, else this one alone."""

    def __init__(self, device: str) -> None:
        self.count, self.index, self.device = 1, 0, torch.device(device)
        self.accelerator: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            try:
                from accelerate import Accelerator
            except ImportError as error:
                raise RuntimeError(
                    "several processes: expected accelerate, found none; "
                    "pip install 'dynmask[recipes]'"
                ) from error
            self.accelerator = Accelerator(cpu=self.device.type == "cpu")
            self.count = self.accelerator.num_processes
            self.index = self.accelerator.process_index
            self.device = self.accelerator.device

    def average(self, parameters: list[nn.Parameter]) -> None:
        """Average gradients over the processes, all in one message."""
        if self.accelerator is None:
            return
        for parameter in parameters:  # a part that one process did not use
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([p.grad.flatten() for p in parameters])
        flat = self.accelerator.reduce(flat, "mean")
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad.copy_(part.view_as(p))

    def agree(self, value: float) -> float:
        """Return the mean of a number over the processes, so that all of them stop together."""
        if self.accelerator is None:
            return value
        return float(self.accelerator.reduce(torch.tensor([value], device=self.device), "mean"))


@dataclass(frozen=True)
class Loop:
    """How long and how fast to train; what ends first of ``minutes`` and ``steps`` ends it."""

    seed: int
    minutes: float = math.inf
    steps: int = 10**9
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    decay_from: float = 0.6
    clip: float = 1.0
    log_seconds: float = 5.0
    sync_steps: int = 10
    checkpoint_minutes: float = 1.0

    def __post_init__(self) -> None:
        if math.isinf(self.minutes) and self.steps >= 10**9:
            raise ValueError("minutes: expected minutes or steps, received neither; pass one")
        if self.minutes <= 0 or self.steps < 1:
            raise ValueError(
                f"minutes, steps: expected more than 0, received {self.minutes}, {self.steps}"
            )

    def progress(self, step: int, seconds: float) -> float:
        """Return how much of the run has passed, from 0 to 1."""
        return min(1.0, max(seconds / (60 * self.minutes), step / self.steps))

    def rate(self, step: int, progress: float) -> float:
        """Return the learning rate: warm-up in steps, then constant, then linear to zero."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        decay = min(1.0, (1.0 - progress) / (1.0 - self.decay_from))
        return self.learning_rate * warm * max(decay, 0.01)


def adamw(
    model: nn.Module, loop: Loop, weight_decay: float, betas: tuple[float, float],
    scaled: dict[str, float] | None = None,
) -> torch.optim.AdamW:  # fmt: skip
    """Return AdamW; only matrices decay; ``scaled`` parts have learning rates of their own."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        factor = next((f for part, f in (scaled or {}).items() if part in name), 1.0)
        decay = weight_decay if parameter.dim() > 1 and factor == 1.0 else 0.0
        groups.setdefault((decay, factor), []).append(parameter)
    fused = next(model.parameters()).device.type == "cuda"
    return torch.optim.AdamW(
        [{"params": p, "weight_decay": d, "factor": f} for (d, f), p in groups.items()],
        lr=loop.learning_rate, betas=betas, fused=fused, capturable=fused,
    )  # fmt: skip


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group, times its factor, in place where it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate * group["factor"])
        else:
            group["lr"] = rate * group["factor"]


class Captured:
    """A training step of a small model as CUDA graphs, one for each shape of the batch.

    Small models spend their time on launches. ``step(*batch)`` does everything from the forward
    to the optimizer's step and returns a tensor. It is run as it is a few times, then captured and
    replayed; where it cannot be captured, or without a GPU, it goes on being run as it is.
    Random numbers follow torch's seed as ever.

    Args:
        step: the step; learning rates have to be tensors on the device.
        eager: runs of each shape before it is captured.
    """

    def __init__(self, step: Callable[..., Tensor], eager: int = 3) -> None:
        self.step, self.eager = step, eager
        self.left: dict[Any, int] = {}
        self.graphs: dict[Any, tuple[Any, tuple[Tensor, ...], Tensor]] = {}
        self.pool: Any = None
        self.why_not = ""

    def __call__(self, *batch: Tensor) -> Tensor:
        """Run one step; what it returns is a copy."""
        if not batch[0].is_cuda or self.why_not:
            return self.step(*batch)
        name = tuple(part.shape for part in batch)
        left = self.left.get(name, self.eager)
        if left:
            self.left[name] = left - 1
            return self._aside(batch)
        if name not in self.graphs and not self._capture(name, batch):
            return self.step(*batch)
        graph, held, out = self.graphs[name]
        for mine, given in zip(held, batch, strict=True):
            mine.copy_(given)
        graph.replay()
        return out.clone()

    def _aside(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Run a step on a stream of its own, as capturing does."""
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            out = self.step(*batch)
        here.wait_stream(aside)
        return out

    def _capture(self, name: Any, batch: tuple[Tensor, ...]) -> bool:
        held = tuple(part.clone() for part in batch)
        graph = torch.cuda.CUDAGraph()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                out = self.step(*held)
        except RuntimeError as error:
            torch.cuda.synchronize()
            self.why_not = str(error).split("\n", 1)[0][:200]
            return False
        self.graphs[name] = graph, held, out
        return True


def save_state(path: Path, model: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
    """Write weights, moments and the state into one safetensors file, atomically."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors["model." + name] = parameter.detach().contiguous()
        for moment in ("exp_avg", "exp_avg_sq", "step"):
            if moment in optimizer.state[parameter]:
                tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    save_file(tensors, str(beside), {"state": json.dumps(state)})
    os.replace(beside, path)


def load_state(path: Path, model: nn.Module, optimizer: Any = None) -> dict[str, Any]:
    """Load what :func:`save_state` wrote and return the state."""
    device = next(model.parameters()).device
    fused = optimizer is not None and optimizer.defaults.get("fused")
    with safe_open(str(path), framework="pt", device=str(device)) as file:
        present = set(file.keys())
        for name, parameter in model.named_parameters():
            with torch.no_grad():
                parameter.copy_(file.get_tensor("model." + name))
            if optimizer is None or f"exp_avg.{name}" not in present:
                continue
            moments = {m: file.get_tensor(f"{m}.{name}") for m in ("exp_avg", "exp_avg_sq", "step")}
            if not fused:  # only the fused implementation counts steps on the device
                moments["step"] = moments["step"].cpu()
            optimizer.state[parameter] = moments
        return json.loads(file.metadata()["state"])


def fit(
    loop: Loop,
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    feed: Callable[[int, Callable[[int], float]], Any],
    loss_of: Callable[[Any, int, float], tuple[Tensor, dict[str, Tensor]]],
    folder: Path | None,
    ranks: Ranks,
    resume: bool = False,
    name: str = "",
) -> dict[str, Any]:
    """Train; write ``training.jsonl`` and ``checkpoint.safetensors`` into ``folder``.

    Args:
        loop: how long and how fast.
        model: the module whose parameters are trained.
        optimizer: from :func:`adamw`.
        feed: ``feed(step, progress_of)`` returns the batch of a step; ``progress_of(step)`` is how
            much of the run has passed then, as far as is known now.
        loss_of: ``loss_of(batch, step, progress)`` returns the loss and numbers to log.
        folder: where log and checkpoint go; None keeps neither.
        ranks: the processes of the run.
        resume: go on from the checkpoint, if there is one.
        name: shown by the progress bar.

    Returns:
        step, seconds and the last logged row.

    Raises:
        RuntimeError: the loss is not finite.
    """
    state: dict[str, Any] = {"step": 0, "seconds": 0.0}
    checkpoint = folder / "checkpoint.safetensors" if folder else None
    log = folder / "training.jsonl" if folder else None
    if checkpoint is not None and resume and checkpoint.is_file():
        state = load_state(checkpoint, model, optimizer)
        if log is not None and ranks.index == 0:  # steps after the checkpoint are made again
            rows = [row for row in read_rows(log) if row["step"] <= state["step"]]
            log.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif log is not None and ranks.index == 0:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("", encoding="utf-8")
    step, earlier, started = state["step"], state["seconds"], time.perf_counter()
    saved = logged = seconds = earlier
    parameters = [p for p in model.parameters() if p.requires_grad]
    timed = math.isfinite(loop.minutes)
    total = round(60 * loop.minutes) if timed else loop.steps
    bar = tqdm(total=total, initial=round(earlier) if timed else step, desc=name,
               unit="s" if timed else "step", mininterval=5, disable=ranks.index > 0)  # fmt: skip
    last: dict[str, Any] = state.get("last", {})

    def clock() -> float:
        return earlier + time.perf_counter() - started

    def progress_of(of: int) -> float:
        return loop.progress(of, clock() if timed else 0.0)

    def save() -> None:
        if checkpoint is not None and ranks.index == 0:
            state = {"step": step, "seconds": clock(), "last": last}
            save_state(checkpoint, model, optimizer, state)

    try:
        while step < loop.steps and (progress := ranks.agree(progress_of(step))) < 1.0:
            batch = feed(step, progress_of)
            torch.manual_seed(seed_of(loop.seed, step, ranks.index))
            rate = loop.rate(step, progress)
            set_rate(optimizer, rate)
            loss, numbers = loss_of(batch, step, progress)
            loss.backward()
            ranks.average(parameters)
            norm = torch.nn.utils.clip_grad_norm_(parameters, loop.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            done = step >= loop.steps or (timed and clock() >= total)
            if step % loop.sync_steps and step > 10 and not done:
                continue
            value = loss.item()  # waits for the device, so that the clock is right
            seconds = clock()
            if not math.isfinite(value):
                raise RuntimeError(f"the loss is {value} at step {step}; lower the learning rate")
            if seconds - logged >= loop.log_seconds or done:
                last = {"step": step, "seconds": round(seconds, 1), "lr": rate, "loss": value,
                        "gradient_norm": float(norm),
                        **{k: float(v) for k, v in numbers.items()}}  # fmt: skip
                if log is not None and ranks.index == 0:
                    append_row(log, last)
                bar.set_postfix_str(
                    f"step {step} loss {value:.3f} "
                    + " ".join(f"{k} {float(v):.3f}" for k, v in numbers.items())
                )
                bar.update((round(seconds) if timed else step) - bar.n)
                logged = seconds
            if seconds - saved >= 60 * loop.checkpoint_minutes:
                save()
                saved = seconds
    except KeyboardInterrupt:
        save()
        sys.exit(f"\nstopped at step {step}; run the same command with --resume to go on")
    finally:
        bar.close()
    save()
    return {**last, "step": step, "seconds": round(clock(), 1)}
