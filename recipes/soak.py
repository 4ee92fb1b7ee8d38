"""A served model under mixed load: answers, refusals, and the memory over time.

    python recipes/soak.py --minutes 30                    # the reference model, its gated card
    python recipes/soak.py --minutes 60 --device cpu --long 4096 --dense-up-to 1024
    python recipes/soak.py --minutes 2 --device cpu --smoke --out /tmp/trial
    python recipes/soak.py --minutes 10 --device cpu --smoke --plain    # vLLM's own attention
    python recipes/soak.py --minutes 1 --device cpu --smoke --kill      # then its worker is killed
    python recipes/soak.py --draw docs/soak.png            # the memory of the rows that there are

`dynmask serve` is started; some clients at once ask short and long questions with known answers,
hang up in the middle, send malformed requests, and prompts that are too long. Beforehand
transformers answers the same questions under the same policy, one at a time, as the offline result.
A row counts requests of each kind and the statuses of their answers, answers that differ from the
offline ones, answers that are wrong, and what was not as expected (a refusal without a message is
not). It holds the memory of each of the server's processes (and of the GPU) over the time: the
curve, and, after a warm-up, the medians of its first and its last quarter and the slope. It is
written once a minute, so a run that is stopped leaves one. The server's log is `soak.log` beside
it. With `--kill` the process that computes is killed in the end, while it answers: the row says
what the askers heard, and how long it took until `--restart 1` had the next one answered. Only the
server that it started is asked, at this machine's own address.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from vllm_compare import ROOT, require_vllm, write_entry_points

from benchmarks.generator import RESULTS
from benchmarks.headline import rows_of, write_rows
from dynmask.cli.serve import DENSE_UP_TO
from dynmask.evals.lines import Lines
from dynmask.evals.provenance import machine
from dynmask.evals.task import Item

MODELS = ROOT / "models"
KINDS = ("short", "long", "cancelled", "malformed", "too long")
WEIGHTS = (4, 2, 2, 1, 1)
SHORT, LONG, SMOKE_LONG = 512, 16_384, 1_024
SAMPLES, LEAST_SAMPLE_S = 240, 2.0
WARM_UP = 1 / 6
"""Share of the time that memory takes to settle: what is allocated once is no growth."""
WRITE_S = 60.0
STOP_S, RESTART_S = 120.0, 600.0
MEGA = 1e6
PARTS = {
    "supervisor": b"supervise.py",
    "engine": b"EngineCore",
    "worker": b"Worker",
    "server": b"vllm.entrypoints",
}
"""Marks in the titles of processes; the first that fits says what one does."""
SAME = ("case", "minutes", "settings")
"""What a row has in common with the one whose place it takes."""
SETTINGS = (
    "OMP_NUM_THREADS", "VLLM_CPU_KVCACHE_SPACE", "LD_PRELOAD",
    "MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_",
)  # fmt: skip
"""Environment variables that a row names: what memory and time depend on."""

MALFORMED = (
    b"{",
    b'{"prompt": 3.5}',
    b'{"prompt": "a", "max_tokens": -1}',
    b'{"prompt": [-1]}',
    b'{"prompt": "a", "temperature": "hot"}',
    b"\xff\xfe",
)
"""Bodies that are no requests."""


@dataclass
class Tally:
    """What was heard, from all clients."""

    sent: Counter[str] = field(default_factory=Counter)
    statuses: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    refusals: Counter[str] = field(default_factory=Counter)
    surprises: list[str] = field(default_factory=list)
    different: int = 0
    wrong: int = 0
    wrong_offline: int = 0
    answered: int = 0
    slowest_s: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class Question:
    """An item and what transformers answered."""

    item: Item
    offline: str


def main(argv: list[str] | None = None) -> None:
    """Start the server, ask for some minutes, stop it, write a row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", type=Path, default=MODELS / "dynmask-reference")
    parser.add_argument("--card", type=Path, default=MODELS / "dynmask-reference-gated")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--questions", type=int, default=8, help="of each length")
    parser.add_argument("--short", type=int, default=SHORT, help=f"tokens ({SHORT})")
    parser.add_argument("--long", type=int, help=f"tokens ({LONG}; --smoke: {SMOKE_LONG})")
    parser.add_argument("--dense-up-to", type=int, help="of dynmask serve")
    parser.add_argument("--plain", action="store_true", help="vLLM's own attention, to compare")
    parser.add_argument("--kill", action="store_true", help="kill the worker in the end")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="short prompts: does it run through?")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--draw", type=Path, metavar="PICTURE", help="of measured rows, then stop")
    args = parser.parse_args(argv)
    if args.draw:
        draw([row for row in rows_of(args.out / "soak.jsonl") if not row.get("killed")], args.draw)
        return
    if args.kill and args.plain:
        parser.error("--kill: expected dynmask serve, which starts again; received --plain too")
    require_vllm("recipes/soak.py")
    # ended from outside, it still ends the server that it started
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    device = torch.device(args.device)
    here = machine(device)
    here["commit"] = args.commit or here["commit"]
    here["versions"]["vllm"] = version_of_vllm()
    if args.long is None:
        args.long = SMOKE_LONG if args.smoke else LONG
    if args.dense_up_to is None:
        args.dense_up_to = args.short // 2 if args.smoke else DENSE_UP_TO
    print("asking transformers first", flush=True)
    questions = offline(args, device)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), args, device)
        record = Record(args, here, server)
        try:
            server.start()
            ask(server, questions, args, record)
            if args.kill:
                record.killed = kill_and_ask(server, questions["short"][0], args)
            record.finish(alive=server.process.poll() is None)
        finally:
            server.stop()
    show(record.row(), record.tally)
    again = record.killed is None or record.killed["right_again"]
    if record.tally.surprises or not record.alive or not again:
        sys.exit(1)


def version_of_vllm() -> str | None:
    """Its version; builds for CPUs have another name."""
    for name in ("vllm-cpu", "vllm"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def offline(args: argparse.Namespace, device: torch.device) -> dict[str, list[Question]]:
    """Questions of each length, with what transformers answers under the same policy."""
    import transformers

    import dynmask

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    model = model.to(device).eval()
    policy: Any = dynmask.policies.Causal()
    if not args.plain:
        card = dynmask.MaskCard.from_pretrained(args.card)
        gated = card.header["policy"] == "gated"
        policy = card.policy(**({"dense_up_to": args.dense_up_to} if gated else {}))
    found: dict[str, list[Question]] = {}
    with torch.inference_mode(), dynmask.sparsify(model, policy):
        for name, length in (("short", args.short), ("long", args.long)):
            items = Lines().items(tokenizer, args.questions, length - 32, args.seed)
            found[name] = []
            for item in items:
                ids = torch.tensor([tokenizer(item.prompt)["input_ids"]], device=device)
                out = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=item.max_new_tokens,
                    do_sample=False,
                )  # fmt: skip
                text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
                found[name].append(Question(item, text))
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


class Server:
    """`dynmask serve` as a process of its own; with ``--plain`` vLLM's own under the same load."""

    def __init__(self, folder: Path, args: argparse.Namespace, device: torch.device) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.model, self.longest = str(args.model), args.long + 64
        cpu = device.type == "cpu"
        where = ["--host", "127.0.0.1", "--port", str(self.port)]
        rest = [
            "--max-model-len", str(self.longest),
            "--dtype", "float32" if cpu else "bfloat16", *(["--enforce-eager"] if cpu else []),
        ]  # fmt: skip
        if args.plain:
            whole = ["--no-enable-chunked-prefill", "--no-enable-prefix-caching"]
            start = ["-m", "vllm.entrypoints.cli.main", "serve", self.model, *where, *whole]
        else:
            from dynmask import MaskCard

            gated = MaskCard.from_pretrained(args.card).header["policy"] == "gated"
            own = ["--dense-up-to", str(args.dense_up_to)] if gated else []
            own += ["--restart", "1"] if args.kill else []
            card = ["--card", str(args.card)]
            start = ["-m", "dynmask.cli", "serve", self.model, *card, *own, *where, "--"]
        self._command = [sys.executable, *start, *rest]
        paths = [str(ROOT / "src"), str(ROOT), str(write_entry_points(folder))]
        paths += filter(None, [os.environ.get("PYTHONPATH")])
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "VLLM_NO_USAGE_STATS": "1",
        }
        if cpu:
            self.environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        self._log = args.out / "soak.log"

    def start(self) -> None:
        """Start it and wait until it answers."""
        self.process = subprocess.Popen(
            self._command, env=self.environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert self.process.stdout is not None
        said = []
        for line in self.process.stdout:
            said.append(line)
            if "Application startup complete" in line:
                self._reader = threading.Thread(target=self._listen, daemon=True)
                self._reader.start()
                self._connect()
                return
        raise RuntimeError("the server did not start:\n" + "".join(said[-60:]))

    def _connect(self) -> None:
        """Wait until it listens, which is a moment after it says that it is ready."""
        stop, pause = time.monotonic() + STOP_S, threading.Event()
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 10).close()
                return
            except ConnectionRefusedError:
                if time.monotonic() > stop:
                    raise
                pause.wait(0.05)

    def _listen(self) -> None:
        """Keep what is said in a file, so that the pipe never fills."""
        assert self.process.stdout is not None
        with self._log.open("w", encoding="utf-8") as log:
            for line in self.process.stdout:
                log.write(line)

    def stop(self) -> None:
        """End it and its own processes."""
        process = getattr(self, "process", None)
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            for entry in self.processes():
                os.kill(int(entry.name), signal.SIGKILL)

    def post(
        self, body: bytes, hang_up: bool = False, begun: Callable[[], None] | None = None
    ) -> tuple[int, bytes]:
        """Status and answer.

        Args:
            body: of the request.
            hang_up: leave after what comes first of the answer.
            begun: called when that has come.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            head = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", body, head)
            answer = connection.getresponse()
            if begun is None:
                return answer.status, answer.read(64) if hang_up else answer.read()
            first = answer.read(64)
            begun()
            return answer.status, first + answer.read()
        finally:
            connection.close()

    def memory(self) -> dict[str, dict[str, int]]:
        """Bytes of each part of the server: rss, pss (what is shared is divided), anonymous."""
        found: dict[str, dict[str, int]] = {}
        for entry in self.processes():
            try:
                add(found, part_of(entry), memory_of(entry))
            except OSError:
                continue  # it has ended meanwhile
        return found

    def processes(self) -> Iterator[Path]:
        """Folders in /proc of the server's processes: those of its session."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if os.getsid(int(entry.name)) == self.process.pid:
                        yield entry
                except OSError:
                    continue


def part_of(entry: Path) -> str:
    """What a process of the server does, by its title."""
    title = (entry / "cmdline").read_bytes()
    for part, mark in PARTS.items():
        if mark in title:
            return part
    return "others"


def memory_of(entry: Path) -> dict[str, int]:
    """Bytes of one process, from its folder in /proc."""
    lines = (line.split() for line in (entry / "smaps_rollup").read_text().splitlines()[1:])
    sizes = {words[0].rstrip(":").lower(): int(words[1]) * 1024 for words in lines}
    return {name: sizes.get(name, 0) for name in ("rss", "pss", "anonymous")}


def add(found: dict[str, dict[str, int]], part: str, sizes: dict[str, int]) -> None:
    """Add a process to its part and to all of them."""
    for name in (part, "all"):
        own = found.setdefault(name, {})
        for kind, size in sizes.items():
            own[kind] = own.get(kind, 0) + size


class Record:
    """What is written: the counts and the memory, once a minute and at the end."""

    def __init__(self, args: argparse.Namespace, here: dict[str, Any], server: Server) -> None:
        self.args, self.here = args, here
        self.settings = {k: v for k in SETTINGS if (v := server.environment.get(k))}
        self.tally = Tally()
        self.curve: list[dict[str, Any]] = []
        self.alive, self.finished = True, False
        self.killed: dict[str, Any] | None = None
        self._written = 0.0

    def sample(self, passed: float, memory: dict[str, dict[str, int]]) -> None:
        """Keep the memory at a time; write the row if it is time to."""
        point = {"s": round(passed, 1), "requests": self.tally.sent.total(), **megabytes(memory)}
        gpu = gpu_bytes()
        self.curve.append(point if gpu is None else point | {"gpu": round(gpu / MEGA, 1)})
        if passed - self._written >= WRITE_S:
            self._written = passed
            self.write()

    def finish(self, alive: bool) -> None:
        """The last row of a run that went on to its end."""
        self.alive, self.finished = alive, True
        self.write()

    def row(self) -> dict[str, Any]:
        """Everything so far."""
        args, tally = self.args, self.tally
        name = f"soak {args.model.name}{' vllm' * args.plain}{' killed' * args.kill}"
        with tally.lock:
            return {
                "case": name, "card": None if args.plain else args.card.name,
                "minutes": args.minutes, "clients": args.clients,
                "dense_up_to": None if args.plain else args.dense_up_to,
                "short": args.short, "long": args.long, "sent": dict(tally.sent),
                "statuses": {kind: dict(own) for kind, own in sorted(tally.statuses.items())},
                "refusals": dict(tally.refusals),
                "answered": tally.answered, "different_from_offline": tally.different,
                "wrong": tally.wrong, "wrong_offline": tally.wrong_offline,
                "unexpected": len(tally.surprises), "surprises": tally.surprises[:20],
                "slowest_s": round(tally.slowest_s, 2), "finished": self.finished,
                "alive_at_the_end": self.alive, "killed": self.killed, "growth": growth(self.curve),
                "settings": self.settings, "memory_mb": self.curve, **self.here,
            }  # fmt: skip

    def write(self) -> None:
        """Write the row in place of an earlier one."""
        row, out = self.row(), self.args.out / "soak.jsonl"
        others = [r for r in rows_of(out) if any(r[name] != row[name] for name in SAME)]
        write_rows(out, [*others, row])


def megabytes(memory: dict[str, dict[str, int]]) -> dict[str, float]:
    """Flat, such as ``engine_rss``, in MB of 10^6 bytes."""
    return {
        f"{part}_{kind}": round(size / MEGA, 1)
        for part, own in memory.items()
        for kind, size in own.items()
    }


def growth(curve: list[dict[str, Any]], warm_up: float = WARM_UP) -> dict[str, dict[str, float]]:
    """How memory went on after the warm-up, of each part: medians of quarters, slopes in MB/hour.

    Empty where there are too few samples to tell. The slope is the median of those between all
    pairs of samples (Theil and Sen), which a few outliers do not move; that of the last half says
    whether it still goes on at the end.
    """
    if not curve:
        return {}
    kept = [point for point in curve if point["s"] >= warm_up * curve[-1]["s"]]
    if len(kept) < 8:
        return {}
    found = {}
    for name in sorted(set(kept[0]) - {"s", "requests"}):
        points = [(point["s"] / 3600, point[name]) for point in kept if name in point]
        size, quarter = [y for _, y in points], len(points) // 4
        first, last = statistics.median(size[:quarter]), statistics.median(size[-quarter:])
        found[name] = {
            "first_quarter_mb": round(first, 1), "last_quarter_mb": round(last, 1),
            "grown_mb": round(last - first, 1), "most_mb": max(size),
            "mb_per_hour": round(slope(points), 1),
            "mb_per_hour_last_half": round(slope(points[len(points) // 2 :]), 1),
        }  # fmt: skip
    return found


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The median slope between pairs of points (x, y)."""
    x, y = torch.tensor(points, dtype=torch.float64).unbind(1)
    one, other = torch.triu_indices(len(x), len(x), 1)
    return ((y[other] - y[one]) / (x[other] - x[one])).quantile(0.5).item()


def ask(
    server: Server, questions: dict[str, list[Question]], args: argparse.Namespace, record: Record
) -> None:
    """Let clients ask until the time is over, and keep what they heard and the memory."""
    over, seconds = threading.Event(), args.minutes * 60
    every = max(seconds / SAMPLES, LEAST_SAMPLE_S)
    started = time.monotonic()
    clients = [
        threading.Thread(
            target=client,
            args=(server, questions, record.tally, over, random.Random(args.seed + i)),
        )
        for i in range(args.clients)
    ]
    for one in clients:
        one.start()
    try:
        while (passed := time.monotonic() - started) < seconds and server.process.poll() is None:
            record.sample(passed, server.memory())
            if over.wait(min(every, seconds - passed)):
                break  # a client found nobody there
    finally:
        over.set()
        for one in clients:
            one.join()


def kill_and_ask(server: Server, question: Question, args: argparse.Namespace) -> dict[str, Any]:
    """Kill the process that computes while it answers two requests, then ask until one is answered.

    Returns what the two askers heard, how long the server was away, and whether it was right again.
    """
    victim = victim_of(server)
    name, heard, killed_at = part_of(victim), {}, []

    def kill() -> None:
        killed_at.append(time.monotonic())
        os.kill(int(victim.name), signal.SIGKILL)

    def listen(stream: bool) -> None:
        more = {"ignore_eos": True, "stream": stream}
        asked = body(server, question.item.prompt, args.long - args.short, **more)
        try:
            status, text = server.post(asked, begun=kill if stream else None)
            said = f"{status} {end_of(text)}"
        except (OSError, http.client.HTTPException) as error:
            said = f"{type(error).__name__}: {error}"
        heard["streamed" if stream else "whole"] = said

    whole = threading.Thread(target=listen, args=(False,))
    whole.start()
    listen(True)  # it comes second, so the other one is under way when this one's first token comes
    whole.join()
    answer = wait_for_answer(server, question)
    away = time.monotonic() - killed_at[0]
    right = answer == question.offline
    return {"killed": name, "heard": heard, "away_s": round(away, 1), "right_again": right}


def victim_of(server: Server) -> Path:
    """The process that computes: a worker, or the engine where that is one with it."""
    parts = {part_of(entry): entry for entry in server.processes()}
    return parts.get("worker") or parts["engine"]


def wait_for_answer(server: Server, question: Question) -> str | None:
    """The answer to a question as soon as there is one; None where the server has ended."""
    asked, pause = (
        body(server, question.item.prompt, question.item.max_new_tokens),
        threading.Event(),
    )
    stop = time.monotonic() + RESTART_S
    while time.monotonic() < stop and server.process.poll() is None:
        try:
            status, text = server.post(asked)
            if status == 200:
                return json.loads(text)["choices"][0]["text"]
        except (OSError, http.client.HTTPException):
            pass  # nobody is there yet
        pause.wait(0.2)
    return None


def end_of(text: bytes) -> str:
    """What an answer says of an error: that of a stream is one of its events."""
    events = [line.removeprefix(b"data: ") for line in text.splitlines()]
    said = [found for event in events if (found := message(event))]
    return said[-1] if said else text[-160:].decode(errors="replace")


def gpu_bytes() -> int | None:
    """Memory in use on the GPU, by whomever; None where there is none."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return total - free


def client(
    server: Server,
    questions: dict[str, list[Question]],
    tally: Tally,
    over: threading.Event,
    draw: random.Random,
) -> None:
    """Ask one thing after the other until the time is over."""
    while not over.is_set():
        (kind,) = draw.choices(KINDS, WEIGHTS)
        started = time.monotonic()
        try:
            said = one_request(server, questions, kind, tally, draw)
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            said = f"{kind}: {type(error).__name__}: {error}"
        with tally.lock:
            tally.sent[kind] += 1
            tally.slowest_s = max(tally.slowest_s, time.monotonic() - started)
            if said:
                tally.surprises.append(said)
        if "ConnectionRefused" in said:  # nobody is there any more
            over.set()


def one_request(
    server: Server,
    questions: dict[str, list[Question]],
    kind: str,
    tally: Tally,
    draw: random.Random,
) -> str:
    """One request of a kind; what was not as expected, or nothing."""
    if kind in ("malformed", "too long"):
        asked = draw.choice(MALFORMED)
        if kind == "too long":
            asked = body(server, [5] * (server.longest + draw.choice((1, 1000))), 4)
        status, text = server.post(asked)
        said = message(text)
        with tally.lock:
            tally.statuses[kind][str(status)] += 1
            tally.refusals[f"{status} {said[:160]}"] += 1
        return "" if 400 <= status < 500 and said else f"{kind}: {status} {text[:200]!r}"
    own = questions["long" if kind == "long" or draw.random() < 0.3 else "short"]
    question = draw.choice(own)
    if kind == "cancelled":
        stream = body(server, question.item.prompt, 64, stream=True)
        status, text = server.post(stream, hang_up=True)
        with tally.lock:
            tally.statuses[kind][str(status)] += 1
        return "" if status == 200 else f"cancelled: {status} {text[:200]!r}"
    status, text = server.post(body(server, question.item.prompt, question.item.max_new_tokens))
    with tally.lock:
        tally.statuses[kind][str(status)] += 1
    if status != 200:
        return f"{kind}: {status} {text[:200]!r}"
    answer = json.loads(text)["choices"][0]["text"]
    score = Lines().score
    with tally.lock:
        tally.answered += 1
        tally.different += answer != question.offline
        tally.wrong += not score(question.item, answer)
        tally.wrong_offline += not score(question.item, question.offline)
    return ""


def message(text: bytes) -> str:
    """What a refusal says in the field of OpenAI's protocol; nothing where it has none."""
    try:
        said = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return ""
    return " ".join(said.split()) if isinstance(said, str) else ""


def body(server: Server, prompt: Any, tokens: int, **more: Any) -> bytes:
    """A request for a greedy answer."""
    asked = {"model": server.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    return json.dumps(asked | more).encode()


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the memory of all processes of each row against the time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for row in rows:
        name = "dynmask" if row["card"] else "vLLM's own attention"
        name += ", malloc's thresholds fixed" if "MALLOC_MMAP_THRESHOLD_" in row["settings"] else ""
        minutes = [point["s"] / 60 for point in row["memory_mb"]]
        size = [point["all_anonymous"] for point in row["memory_mb"]]
        axes.plot(minutes, size, lw=1.3, label=f"{name} ({sum(row['sent'].values()):,} requests)")
    axes.set(
        xlabel="minutes",
        ylabel="anonymous memory, MB",
        ylim=(0, None),
        xlim=(0, None),
    )
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    device = ", ".join(sorted({row["device"]["name"] for row in rows}))
    axes.set_title(f"all processes of a server under mixed load, {device}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def show(row: dict[str, Any], tally: Tally) -> None:
    """Print what a row says, and what was not as expected."""
    print(
        f"{row['case']}: {sum(row['sent'].values())} requests {row['sent']}, {row['answered']} "
        f"answers, {row['different_from_offline']} unlike transformers', {row['wrong']} wrong "
        f"({row['wrong_offline']} offline), {row['unexpected']} unexpected, slowest "
        f"{row['slowest_s']:.1f} s"
    )
    for name, own in row["growth"].items():
        print(
            f"  {name:12s} {own['first_quarter_mb']:9,.1f} MB -> {own['last_quarter_mb']:9,.1f}, "
            f"{own['mb_per_hour']:+8.1f} MB/hour ({own['mb_per_hour_last_half']:+.1f} in the last "
            "half)"
        )
    if row["killed"]:
        print(f"  killed: {row['killed']}")
    for text, times in row["refusals"].items():
        print(f"  refused {times} times: {text}")
    for said in tally.surprises[:20]:
        print(f"  unexpected: {said}")


if __name__ == "__main__":
    main()
