"""vLLM under dynmask beside transformers: the same greedy tokens, on this device.

    python recipes/vllm_equal.py                      # the reference model, its cards, streaming
    python recipes/vllm_equal.py --only streaming     # some
    python recipes/vllm_equal.py --smoke              # toy sizes: does it run through?

Each policy gets an engine of its own, which answers prompts of several lengths in one batch; two of
them begin alike, so that the second finds a cached prefix where the policy allows one. transformers
answers them one by one under the same policy. What is compared is every answer up to the end of its
line; a row of ``benchmarks/results/vllm_equal.jsonl`` says how many answers are the same, how many
are right, and how many full attention answers otherwise (so that it says something). In float32 all
are the same (the tests); in bfloat16, on a GPU, two kernels round apart, and where two tokens are
nearly as likely as each other an answer may part.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "recipes"), str(ROOT), str(ROOT / "src")]

from vllm_compare import environment_of, require_vllm  # noqa: E402

from benchmarks.headline import rows_of, write_rows  # noqa: E402
from dynmask.evals.generation import attend, greedy, needed_cache  # noqa: E402
from dynmask.evals.needle import Needle  # noqa: E402
from dynmask.evals.provenance import machine  # noqa: E402
from dynmask.policies import parse  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "vllm_equal.jsonl"
MODEL = ROOT / "models" / "dynmask-reference"
LENGTHS = (600, 2_000, 4_000, 8_000, 16_000)
NEW = 12
MARK = "answers: "
CASES: dict[str, tuple[str, bool]] = {
    "streaming": ("streaming:sinks=4,window=256", False),
    "gated": (f"gated:{MODEL}-gated", True),
    "narrow": ("gated:window=32,columns=64", True),
    "select": ("gated:window=32,columns=64,decode=select", True),
    "retained": (f"retained:{MODEL}-retained,width=256", False),
}
"""Policies, and whether prompts are read in one piece."""

Row = dict[str, Any]


def prompts_of(tokenizer: Any, lengths: tuple[int, ...]) -> list[tuple[list[int], Any]]:
    """Token ids of a needle at each length, the last once more without its last token."""
    found = [
        (tokenizer(item.prompt, add_special_tokens=False).input_ids, item)
        for length in lengths
        for item in Needle().items(tokenizer, 2, length, 0)
    ]
    ids, item = found[-1]
    return [*found, (ids[:-1], item)]  # begins like the one before


def of_transformers(model: Any, prompts: list[list[int]], policy: Any) -> list[list[int]]:
    """Greedy answers, one prompt after the other."""
    found = []
    for ids in prompts:
        with attend(model, policy) as run:
            asked = torch.tensor([ids], device=model.device)
            found.append(greedy(model, asked, NEW, cache=needed_cache(run)).tokens)
    return found


def of_vllm(question: Row, spec: str, folder: Path, limit: int) -> tuple[list[list[int]], str]:
    """Greedy answers of an engine in a process of its own, and its version."""
    path = folder / "question.json"
    path.write_text(json.dumps(question))
    own = environment_of(spec, folder, question["cpu"])
    command = [sys.executable, __file__, "--engine", str(path)]
    done = subprocess.run(
        command, env=own, capture_output=True, text=True, timeout=limit, check=False
    )
    told = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not told:
        raise RuntimeError(f"the engine failed ({done.returncode}):\n{done.stderr[-3000:]}")
    answer = json.loads(told[-1].removeprefix(MARK))
    return answer["tokens"], answer["vllm"]


def engine(question: Row) -> None:
    """Answer a batch of prompts in this process, which is an engine's own."""
    import vllm

    own: Row = {"enable_chunked_prefill": not question["whole"]}
    longest = max(map(len, question["prompts"])) + NEW + 8
    if question["whole"]:
        own["max_num_batched_tokens"] = longest
    if not question["cpu"]:
        own |= {"attention_backend": "CUSTOM", "gpu_memory_utilization": question["memory"]}
    llm = vllm.LLM(
        model=question["model"], dtype=question["dtype"], max_model_len=longest, seed=0,
        enable_prefix_caching=not question["whole"], enforce_eager=question["eager"], **own,
    )  # fmt: skip
    options = vllm.SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    asked: Any = [{"prompt_token_ids": ids} for ids in question["prompts"]]
    found = llm.generate(asked, options, use_tqdm=False)
    tokens = [list(one.outputs[0].token_ids) for one in found]
    print(f"{MARK}{json.dumps({'tokens': tokens, 'vllm': vllm.__version__})}", flush=True)


def line_of(tokens: list[int], tokenizer: Any) -> str:
    """The first line of an answer: what follows it nobody asked for."""
    return tokenizer.decode(tokens).split("\n", 1)[0]


def main(argv: list[str] | None = None) -> None:
    """Compare; a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", nargs="+", metavar="CASE", choices=CASES, default=list(CASES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="toy sizes: does it run through?")
    parser.add_argument("--limit", type=int, default=300, help="seconds an engine may take")
    parser.add_argument("--memory", type=float, default=0.5, help="share of the GPU's memory")
    parser.add_argument("--commit", default=None, help="what is compared, where git cannot tell")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--engine", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.engine is not None:
        engine(json.loads(options.engine.read_text()))
        return
    require_vllm("vllm_equal")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cpu = options.device == "cpu"
    dtype = "float32" if cpu else "bfloat16"
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=getattr(torch, dtype))
    model = model.to(options.device).eval()
    asked = prompts_of(tokenizer, LENGTHS[:1] if options.smoke else LENGTHS)
    prompts = [ids for ids, _ in asked]
    here = machine(torch.device(options.device))
    here["commit"] = options.commit or here["commit"]
    full = [line_of(x, tokenizer) for x in of_transformers(model, prompts, None)]
    apart = []
    for name in options.only:
        spec, whole = CASES[name]
        own = [line_of(x, tokenizer) for x in of_transformers(model, prompts, parse(spec))]
        question = {
            "model": str(MODEL), "prompts": prompts, "whole": whole, "dtype": dtype, "cpu": cpu,
            "eager": cpu, "memory": options.memory,
        }  # fmt: skip
        try:
            with tempfile.TemporaryDirectory() as folder:
                tokens, version = of_vllm(question, spec, Path(folder), options.limit)
        except (RuntimeError, subprocess.TimeoutExpired) as error:  # the others may well run
            print(f"{name:10s} {error}", flush=True)
            apart.append(name)
            continue
        theirs = [line_of(x, tokenizer) for x in tokens]
        pairs = list(zip(theirs, own, full, asked, strict=True))
        row = {
            "variant": name, "policy": spec.replace(str(ROOT) + os.sep, ""), "n": len(pairs),
            "same": sum(a == b for a, b, *_ in pairs),
            "right": sum(Needle().score(item, a) == 1 for a, _, _, (_, item) in pairs),
            "unlike_full": sum(b != c for _, b, c, _ in pairs),
            "apart": [[a, b] for a, b, *_ in pairs if a != b],
            "tokens": list(map(len, prompts)), "dtype": dtype, "vllm": version, **here,
        }  # fmt: skip
        own_place = name, here["device"]["name"]
        kept = [r for r in rows_of(options.out) if (r["variant"], r["device"]["name"]) != own_place]
        write_rows(options.out, [*kept, row])
        print(f"{name:10s} {row['same']} of {row['n']} answers the same, {row['right']} right, "
              f"{row['unlike_full']} unlike full attention's", flush=True)  # fmt: skip
        if row["same"] < row["n"] and cpu:
            apart.append(name)
    if apart:
        sys.exit(f"expected the answers of transformers, received others or none under "
                 f"{', '.join(apart)}")  # fmt: skip


if __name__ == "__main__":
    main()
