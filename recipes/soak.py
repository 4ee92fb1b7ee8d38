"""A served model under mixed load: answers, refusals, and the memory over time.

    python recipes/soak.py --minutes 30                    # the reference model, its gated card
    python recipes/soak.py --minutes 2 --device cpu --smoke --out /tmp/trial

`dynmask serve` is started; some clients at once ask short and long questions with known answers,
hang up in the middle, send malformed requests, and prompts that are too long. Beforehand
transformers answers the same questions under the same policy, one at a time, as the offline result.
A row counts requests of each kind, answers that differ from the offline ones, answers that are
wrong, and statuses that were not those that were expected; it holds the memory of the server's
processes (and of the GPU) every few seconds. The server's log is `soak.log` beside it. Only the
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
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from vllm_compare import ROOT, write_entry_points

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
SAMPLE_S = 5.0
STOP_S = 120.0

MALFORMED = (
    b"{",
    b'{"prompt": 3.5}',
    b'{"prompt": "a", "max_tokens": -1}',
    b'{"prompt": [-1]}',
    b'{"prompt": "a", "temperature": "hot"}',
    b"\xff\xfe",
)
"""Bodies that are no requests; the model's name is added where there is an object."""


@dataclass
class Tally:
    """What was heard, from all clients."""

    sent: Counter[str] = field(default_factory=Counter)
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
    parser.add_argument("--dense-up-to", type=int, help="of dynmask serve")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="short prompts: does it run through?")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    here = machine(device)
    here["commit"] = args.commit or here["commit"]
    long = SMOKE_LONG if args.smoke else LONG
    dense = args.dense_up_to
    if dense is None:
        dense = SHORT // 2 if args.smoke else DENSE_UP_TO
    print("asking transformers first", flush=True)
    questions = offline(args, device, {"short": SHORT, "long": long}, dense)
    with tempfile.TemporaryDirectory() as folder:
        args.out.mkdir(parents=True, exist_ok=True)
        log = args.out / "soak.log"
        server = Server(Path(folder), args.model, args.card, device, long + 64, dense, log)
        try:
            server.start()
            tally, curve = ask(server, questions, args)
            alive = server.process.poll() is None
        finally:
            server.stop()
    row = {
        "case": f"soak {args.model.name}", "card": args.card.name, "minutes": args.minutes,
        "clients": args.clients, "dense_up_to": dense, "longest": long, "sent": dict(tally.sent),
        "answered": tally.answered, "different_from_offline": tally.different,
        "wrong": tally.wrong, "wrong_offline": tally.wrong_offline,
        "unexpected_statuses": len(tally.surprises), "slowest_s": tally.slowest_s,
        "alive_at_the_end": alive, "memory": curve, **here,
    }  # fmt: skip
    out = args.out / "soak.jsonl"
    write_rows(out, [*(r for r in rows_of(out) if r["case"] != row["case"]), row])
    show(row, tally)
    if tally.surprises or not alive:
        sys.exit(1)


def offline(
    args: argparse.Namespace, device: torch.device, lengths: dict[str, int], dense: int
) -> dict[str, list[Question]]:
    """Questions of each length, with what transformers answers under the same policy."""
    import transformers

    import dynmask

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    model = model.to(device).eval()
    card = dynmask.MaskCard.from_pretrained(args.card)
    gated = card.header["policy"] == "gated"
    policy = card.policy(**({"dense_up_to": dense} if gated else {}))
    found: dict[str, list[Question]] = {}
    with torch.inference_mode(), dynmask.sparsify(model, policy):
        for name, length in lengths.items():
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
    """`dynmask serve` as a process of its own."""

    def __init__(
        self,
        folder: Path,
        model: Path,
        card: Path,
        device: torch.device,
        longest: int,
        dense: int,
        log: Path,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.model, self.longest = str(model), longest
        from dynmask import MaskCard

        gated = MaskCard.from_pretrained(card).header["policy"] == "gated"
        own = ["--dense-up-to", str(dense)] if gated else []
        cpu = device.type == "cpu"
        self._command = [
            sys.executable, "-m", "dynmask.cli", "serve", self.model, "--card", str(card), *own,
            "--host", "127.0.0.1", "--port", str(self.port), "--", "--max-model-len", str(longest),
            "--dtype", "float32" if cpu else "bfloat16", *(["--enforce-eager"] if cpu else []),
        ]  # fmt: skip
        paths = [str(ROOT / "src"), str(ROOT), str(write_entry_points(folder))]
        paths += filter(None, [os.environ.get("PYTHONPATH")])
        self._environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "VLLM_NO_USAGE_STATS": "1",
        }
        if cpu:
            self._environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        self._log = log

    def start(self) -> None:
        """Start it and wait until it answers."""
        self.process = subprocess.Popen(
            self._command, env=self._environment, text=True, start_new_session=True,
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
            os.killpg(process.pid, signal.SIGKILL)

    def post(self, body: bytes, hang_up: bool = False) -> tuple[int, bytes]:
        """Status and answer; with ``hang_up`` what came first of it."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            head = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", body, head)
            answer = connection.getresponse()
            return answer.status, answer.read(64) if hang_up else answer.read()
        finally:
            connection.close()

    def bytes(self) -> int:
        """Memory of the server's processes, those that it shares counted once for each."""
        total, group = 0, os.getpgid(self.process.pid)
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if os.getpgid(int(entry.name)) == group:
                        pages = int((entry / "statm").read_text().split()[1])
                        total += pages * os.sysconf("SC_PAGE_SIZE")
                except (OSError, ValueError, IndexError):
                    continue  # it has ended meanwhile
        return total


def ask(
    server: Server, questions: dict[str, list[Question]], args: argparse.Namespace
) -> tuple[Tally, list[dict[str, Any]]]:
    """Let clients ask until the time is over; what they heard, and the memory meanwhile."""
    tally, over, curve = Tally(), threading.Event(), []
    started = time.monotonic()
    clients = [
        threading.Thread(
            target=client, args=(server, questions, tally, over, random.Random(args.seed + i))
        )
        for i in range(args.clients)
    ]
    for one in clients:
        one.start()
    while (passed := time.monotonic() - started) < args.minutes * 60:
        curve.append({"s": round(passed, 1), "bytes": server.bytes(), "gpu_bytes": gpu_bytes()})
        if server.process.poll() is not None:
            break
        over.wait(min(SAMPLE_S, max(args.minutes * 60 - passed, 0.01)))
    over.set()
    for one in clients:
        one.join()
    return tally, curve


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
    if kind == "malformed":
        status, text = server.post(draw.choice(MALFORMED))
        return "" if 400 <= status < 500 else f"malformed: {status} {text[:200]!r}"
    if kind == "too long":
        ids = [5] * (server.longest + draw.choice((1, 1000)))
        status, text = server.post(body(server, ids, 4))
        return "" if 400 <= status < 500 else f"too long: {status} {text[:200]!r}"
    own = questions["long" if kind == "long" or draw.random() < 0.3 else "short"]
    question = draw.choice(own)
    if kind == "cancelled":
        stream = body(server, question.item.prompt, 64, stream=True)
        status, text = server.post(stream, hang_up=True)
        return "" if status == 200 else f"cancelled: {status} {text[:200]!r}"
    status, text = server.post(body(server, question.item.prompt, question.item.max_new_tokens))
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


def body(server: Server, prompt: Any, tokens: int, **more: Any) -> bytes:
    """A request for a greedy answer."""
    asked = {"model": server.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    return json.dumps(asked | more).encode()


def show(row: dict[str, Any], tally: Tally) -> None:
    """Print what a row says, and what was not as expected."""
    memory = [point["bytes"] / 1e6 for point in row["memory"]]
    print(
        f"{row['case']}: {sum(row['sent'].values())} requests {row['sent']}, {row['answered']} "
        f"answers, {row['different_from_offline']} unlike transformers', {row['wrong']} wrong "
        f"({row['wrong_offline']} offline), {row['unexpected_statuses']} unexpected, slowest "
        f"{row['slowest_s']:.1f} s"
    )
    if memory:
        print(f"memory: first {memory[0]:,.0f} MB, most {max(memory):,.0f}, last {memory[-1]:,.0f}")
    for said in tally.surprises[:20]:
        print(f"  unexpected: {said}")


if __name__ == "__main__":
    main()
