"""Tables of README and of pages in docs, written from the result files:
``python benchmarks/tables.py``.

A test runs ``text()`` and compares, so a number in README cannot part from its result.
"""

import argparse
import json
import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.baselines import BASELINES
from benchmarks.gpu_cases import CASES
from benchmarks.headline import rows_of
from dynmask import MaskCard

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
RETAINED = ROOT / "docs" / "retained.md"
DMA = ROOT / "docs" / "dma.md"
GENERATOR = ROOT / "docs" / "generator.md"
LONG = ROOT / "docs" / "long_prompts.md"
DISTRIBUTED = ROOT / "docs" / "distributed.md"
SERVING = ROOT / "docs" / "serving.md"
MODEL = ROOT / "models" / "dynmask-reference"
CARD = ROOT / "models" / "dynmask-reference-retained"

CACHES = (
    ("full", "full", None),
    ("retained per head, w 512", "retained pair per head", 512),
    ("retained per head, w 256", "retained pair per head", 256),
    ("streaming, w 512", "streaming", 512),
    ("SnapKV, w 512", "snapkv", 512),
    ("H2O, w 512", "h2o", 512),
)
"""Rows of README's retained table: name, policy in the results, keys a head."""

ASKED = ((16_384, ("needle", "document", "lines")), (32_768, ("needle", "document")))
"""Its columns: tokens and tasks."""

TASKS = {"needle": "needle", "document": "facts", "lines": "records"}

GATED = ("gated (zero-shot)", "gated (card)", "gated (card, decode=keep)")
"""Policies of other rows that README's table of the reference model ends with."""

SHOWN = ("dynmask", "cudnn", "sdpa", "folded")
"""Variants that README's GPU table and its sentence on decoding speak of."""

SLOT = 8
"""Bytes of a slot of a `BoundedCache` beside its key and value: position and score."""


def reference() -> str:
    """Right answers and density of every policy on the official LongEval files."""
    rows = [r for r in rows_of(RESULTS / "reference.jsonl") if r["task"].startswith("longeval")]
    if not rows:
        return "Not measured yet."
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    policies = list(dict.fromkeys(r["policy"] for r in rows))
    cells = {(r["policy"], r["task"]): r for r in rows}
    first = rows[0]
    head = " | ".join(f"{task.split()[1]} lines" for task in tasks)
    lines = [
        "Reference model, official LongEval lines, greedy, answer prefix given: right answers"
        f", density;\n{first['device']['name']}, {first['dtype']}, torch "
        f"{first['versions']['torch']}:",
        "",
        f"| policy | {head} |",
        "|---|" + "---|" * len(tasks),
    ]
    gated = [r for r in rows_of(RESULTS / "generator_tasks.jsonl") if r["policy"] in GATED]
    gated = [r for r in gated if r["model"] == MODEL.name and r["task"] in tasks]
    cells |= {(r["policy"], r["task"]): r for r in gated}
    named = {r["policy"] for r in gated}
    for policy in [*policies, *(name for name in GATED if name in named)]:
        row = " | ".join(_cell(cells.get((policy, task))) for task in tasks)
        lines.append(f"| {policy} | {row} |")
    if gated:
        devices = {
            "a CPU (keep)" if r["device"]["type"] == "cpu" else r["device"]["name"] for r in gated
        }
        lines += [
            "",
            f"`gated` on {', '.join(sorted(devices))}: density is that of the prompt; "
            "decoded tokens read\nevery key, or with `decode=keep` what the prompt chose. Of 50 "
            "items one is 2 points.",
        ]
    dam = [r for r in rows if r["policy"].startswith("dam")]
    right = round(sum(r["accuracy"] * r["n"] for r in dam))
    lines += [
        "",
        f"DAM as published answers {right} of {sum(r['n'] for r in dam)}: averaging attention over "
        "documents removes all content, and what\nis left, sinks and a narrow band, cannot know "
        "where an answer lies. It is here as the honest baseline.",
    ]
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    return f"{round(row['accuracy'] * row['n'])} of {row['n']}, {row['density']:.1%}"


def retained() -> str:
    """A cache of w keys of the shipped card beside full attention and others that evict."""
    rows = rows_of(RESULTS / "retrofit.jsonl")
    if not rows:
        return "Not measured yet."
    cells = {(r["policy"], r["width"], r["task"], r["length"]): r["accuracy"] for r in rows}
    head = [f"{n:,} tokens: cache | " + " | ".join(TASKS[t] for t in ts) for n, ts in ASKED]
    lines = [
        "The same model, frozen, with the shipped card `models/dynmask-reference-retained`: cache "
        f"(bfloat16) and\nright answers, n = {rows[0]['n']} each, about one fact in prose, one of "
        f"several facts, one of many records;\n{_retrofit_origin(rows)}:",
        "",
        f"| policy | {' | '.join(head)} |",
        "|---|" + "---|" * sum(1 + len(tasks) for _, tasks in ASKED),
    ]
    for name, policy, width in CACHES:
        line = f"| {name} |"
        for length, tasks in ASKED:
            found = [f"{cells[policy, width, task, length]:.0%}" for task in tasks]
            line += f" {_cache_size(policy, width, length)} | {' | '.join(found)} |"
        lines.append(line)
    records = {p: cells[p, w, "lines", ASKED[0][0]] for _, p, w in CACHES if w is not None}
    taught = max(x for p, x in records.items() if p.startswith("retained"))
    return "\n".join(
        [
            *lines,
            "",
            "\\* its keys alone: measured as a mask, which frees nothing (H2O has a cache since).",
            "",
            f"Records do not compress: the taught scores answer {taught:.0%} of them, the best of "
            f"these caches {max(records.values()):.0%}. Nearly every key\nof random lines must be "
            "kept; there a choice that sees the question is needed (`docs/retained.md`).",
        ]
    )


def retained_full() -> str:
    """Every task, length and width of the retrofit."""
    rows = rows_of(RESULTS / "retrofit.jsonl")
    if not rows:
        return "Not measured yet."
    cells = {(r["policy"], r["width"], r["task"], r["length"]): r["accuracy"] for r in rows}
    widths = sorted({r["width"] for r in rows if r["policy"] == "retained pair"})
    kinds = ["retained pair per head", "retained pair", "retained value", "streaming", "snapkv"]
    lines = [
        f"Share of right answers, n = {rows[0]['n']} a cell, held-out words and text, "
        f"{_retrofit_origin(rows)}\n(`python recipes/retrofit.py`, "
        "`benchmarks/results/retrofit.jsonl`):",
        "",
        f"| task, tokens | policy | {' | '.join(f'w {w}' for w in widths)} | full |",
        "|---|---|" + "---|" * (len(widths) + 1),
    ]
    for task in TASKS:
        for length in sorted({r["length"] for r in rows if r["task"] == task}):
            full = cells["full", None, task, length]
            for kind in [*kinds, "h2o"]:
                found = [f"{cells[kind, w, task, length]:.0%}" for w in widths]
                line = f"| {task} {length:,} | {kind} | {' | '.join(found)} | {full:.0%} |"
                lines.append(line)
    return "\n".join(lines)


def _retrofit_origin(rows: list[dict[str, Any]]) -> str:
    """Device, version and commit of the retrofit's rows."""
    found = {(r["device"]["name"], r["versions"]["torch"], r["commit"][:7], r["n"]) for r in rows}
    assert len(found) == 1, f"one sentence cannot speak for {found}"
    device, torch, commit, _ = found.pop()
    return f"{device}, torch {torch}, commit {commit}"


def _cache_size(policy: str, width: int | None, tokens: int) -> str:
    """Size of the reference model's cache in bfloat16, and how much smaller than the full one."""
    config = json.loads((MODEL / "config.json").read_text())
    heads = config["num_hidden_layers"] * config["num_key_value_heads"]
    pair = 2 * 2 * config["head_dim"]  # bytes of a key and its value
    whole = heads * tokens * pair
    if width is None:
        return f"{whole / 1e6:.0f} MB"
    if policy.startswith("retained"):
        size = bounded_bytes(width, 2)
    else:
        size = heads * width * (pair + (SLOT if policy == "streaming" else 0))
    mark = "\\*" if policy in ("snapkv", "h2o") else ""
    return f"{size / 1e6:.1f} MB{mark}, {whole / size:.0f}x smaller"


def bounded_bytes(width: int, itemsize: int) -> int:
    """Bytes of a `BoundedCache` of the shipped card, a width for each head, once it is full."""
    card = MaskCard.from_pretrained(CARD)
    pair = 2 * itemsize * card.header["model"]["head_dim"]
    widths = card.policy(width=width, budget="per_head").width
    # every head of a layer has as many slots as its widest
    return sum(len(layer) * max(layer) for layer in widths) * (pair + SLOT)


def gated() -> str:
    """What the gated policy costs on a GPU, dense attention beside it."""
    rows = rows_of(RESULTS / "generator.jsonl")
    by = {(r["case"], r["variant"]): r for r in rows}
    if not by:
        return "Not measured yet."
    lines = [f"bfloat16, {next(iter(by.values()))['device']['name']}:", "",
             "| gated policy | dense | gated | |", "|---|---|---|---|"]  # fmt: skip
    for case, dense in (("attention 131,072", "cudnn"), ("Llama-3.2-1B 131,072", "sdpa")):
        ours, other = by.get((case, "gated")), by.get((case, dense))
        if ours is None or other is None:
            continue
        times = f"{_seconds(other)} | {_seconds(ours)} | {_ratio(other, ours)}"
        if case.startswith("attention"):
            what = f"attention, 131,072 tokens, 32/8 heads, d 128, density {ours['density']:.1%}"
            lines.append(f"| {what}; {ours['card']} | {times} |")
            continue
        lines.append(f"| {case.replace(' ', ' shape, first token at ', 1)}; {ours['card']} | "
                     f"{times} |")  # fmt: skip
        a, b = (1e-6 * r["decode_peak_bytes"] for r in (other, ours))
        what = "the same, decoding: peak beyond the weights, `decode=keep`"
        lines.append(f"| {what} | {a:,.0f} MB | {b:,.0f} MB | {a / b:.0f}x |")
    return "\n".join(lines)


def million() -> str:
    """Seconds and memory of a long prompt on one GPU, by policy."""
    rows = rows_of(RESULTS / "million.jsonl")
    if not rows:
        return "Not measured yet."
    devices = ", ".join(sorted({r["device"]["name"] for r in rows}))
    lines = [f"Llama-3.2-1B shape, random weights, bfloat16, {devices}; to the first token:", "",
             "| prompt | policy | time | tokens/s | beyond the weights | cache of it |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for r in sorted(rows, key=lambda r: (-r["keys"], r["median_s"])):
        beyond, cache = (1e-9 * r[key] for key in ("peak_beyond_weights_bytes", "cache_bytes"))
        policy = (
            f"{r['variant']}: {r['policy']}" if r["policy"] else "SDPA, the whole prompt at once"
        )
        lines.append(f"| {r['keys']:,} | {policy} | {_seconds(r)} | {r['tokens_per_s']:,.0f} | "
                     f"{beyond:.2f} GB | {cache:.2f} GB |")  # fmt: skip
    return "\n".join(lines)


def gpus() -> str:
    """A prefill on several GPUs beside one."""
    rows = rows_of(RESULTS / "two_gpus.jsonl")
    found = [r for r in rows if "speedup" in r]
    if not found:
        return "Not measured yet."
    lines = [f"Llama-3.2-1B shape, random weights, bfloat16, {found[0]['device']['name']}:", "",
             "| prompt, policy | one GPU | several | | gathering alone | choosing alone |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for r in found:
        one = next(o for o in rows if o["gpus"] == 1 and
                   (o["case"], o["variant"]) == (r["case"], r["variant"]))  # fmt: skip
        lines.append(f"| {r['keys']:,}, {r['variant']} | {_seconds(one)} | {_seconds(r)} on "
                     f"{r['gpus']} | {r['speedup']:.2f}x | {1e3 * r['gather_s']:.0f} ms | "
                     f"{1e3 * r['choice_s']:.0f} ms |")  # fmt: skip
    return "\n".join(lines)


def vllm() -> str:
    """Time to the first token and rate under vLLM, its own attention beside ours."""
    rows = rows_of(RESULTS / "vllm.jsonl")
    own = {r["keys"]: r for r in rows if r["variant"] == "flash"}
    if not own:
        return "Not measured yet."
    first = next(iter(own.values()))
    lines = [f"{first['case']} shape, random weights, bfloat16, vLLM {first['vllm']}, "
             f"{first['device']['name']}; milliseconds to the first token, then tokens a second "
             "(median, least and most of so many rounds):", "",
             "| prompt | attention | first token | | tokens/s |",
             "|---|---|---|---|---|"]  # fmt: skip
    for r in sorted(rows, key=lambda r: (r["keys"], r["variant"] != "flash", r["variant"])):
        every = r["tokens_per_s_all"]
        rates = f"{r['tokens_per_s']:.0f} ({min(every):.0f} to {max(every):.0f}, {len(every)})"
        ratio = own[r["keys"]]["first_s"] / r["first_s"] if r["keys"] in own else None
        times = "" if r["policy"] is None or ratio is None else f"{ratio:.2f}x"
        name = "vLLM's own" if r["policy"] is None else r["variant"]
        lines.append(f"| {r['keys']:,} | {name} | {r['first_s'] * 1e3:,.1f} ms | {times} | "
                     f"{rates} |")  # fmt: skip
    return "\n".join(lines)


def _seconds(row: dict[str, Any]) -> str:
    """A median time in the unit that suits it."""
    median = row["median_s"]
    return f"{median:.2f} s" if median >= 1 else f"{1e3 * median:.3g} ms"


def gated_tasks() -> str:
    """What the gated policy answers: of each model a line for a policy, a column for a task."""
    rows = [r for r in rows_of(RESULTS / "generator_tasks.jsonl") if r["n"]]
    if not rows:
        return "Not measured yet."
    tables = []
    for model in sorted({r["model"] for r in rows}):
        own = [r for r in rows if r["model"] == model]
        tasks = sorted({r["task"] for r in own}, key=lambda t: (t.split()[0], int(t.split()[1])))
        named = {r["policy"] for r in own}
        policies = sorted(filter(_is_shown, named), key=lambda p: (p != "full", p))
        cells = [[_answered(own, task, policy) for task in tasks] for policy in policies]
        devices = sorted({"a CPU" if r["device"]["type"] == "cpu" else r["device"]["name"]
                          for r in own})  # fmt: skip
        lines = [
            f"`{model}`: right answers of how many, and density; {', '.join(devices)}",
            "",
            f"| policy | {' | '.join(tasks)} |",
            "|" + "---|" * (1 + len(tasks)),
            *(f"| {p} | {' | '.join(c)} |" for p, c in zip(policies, cells, strict=True)),
        ]
        if len(policies) < len(named):
            lines += ["", f"{len(named) - len(policies)} more settings that were tried: the file."]
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _is_shown(policy: str) -> bool:
    """Whether a policy stands in the table: no card of an earlier kind, no earlier decoding."""
    kind = policy.removeprefix("gated (max_kl ").rstrip(")")
    earlier = policy.startswith("gated (max_kl ") and not kind.replace(".", "").isdecimal()
    return not earlier and not (policy.startswith("gated:") and "decode=" in policy)


def _answered(rows: list[dict[str, Any]], task: str, policy: str) -> str:
    """Right answers and density of a policy on a task; of several groups the mean of their shares.

    The CPU's few items are told apart by a star; where some groups are missing it is said.
    """
    found = [r for r in rows if (r["task"], r["policy"]) == (task, policy)]
    if not found:
        return "-"
    n, star = sum(r["n"] for r in found), "*" * (found[0]["device"]["type"] == "cpu")
    share = statistics.mean(r["accuracy"] for r in found)
    right = f"{share:.1%}, n {n}" if len(found) > 1 else f"{share * n:.3g} of {n}"
    groups = len({r["group"] for r in rows if r["task"] == task})
    if len(found) < groups:
        right += f", {len(found)} of {groups} tasks"
    density = statistics.mean(r["density"] for r in found)
    return f"{right}{star}" if policy == "full" else f"{right}{star}; {density:.2%}"


def baselines() -> str:
    """What every policy answers, reads and takes on the same questions; "-" is not measured yet."""
    rows = rows_of(RESULTS / "baselines.jsonl")
    tasks = list(dict.fromkeys((r["model"], r["task"], r["group"]) for r in rows))
    tables = []
    for model, task, group in tasks or [(MODEL.name, "longeval 600", "")]:
        own = {r["policy"]: r for r in rows if (r["model"], r["task"], r["group"]) ==
               (model, task, group)}  # fmt: skip
        labels = list(dict.fromkeys([*(one.label for one in BASELINES), *own]))
        origins = {(r["device"]["name"], r["dtype"], r["versions"]["torch"], str(r["commit"])[:7])
                   for r in own.values()}  # fmt: skip
        said = [f"{device}, {dtype}, torch {torch}, commit {commit}"
                for device, dtype, torch, commit in sorted(origins)]  # fmt: skip
        tables.append("\n".join([
            f"`{model}`, {task}; {'; '.join(said) or 'not measured yet'}:", "",
            "| policy | right | points to full (95 %) | density | decoding | attention kept | KL | "
            "prefill | a token | memory |", "|" + "---|" * 10,
            *(f"| {label} | {' | '.join(_baseline(own.get(label, {})))} |" for label in labels),
        ]))  # fmt: skip
    return "\n\n".join(tables)


def _baseline(row: dict[str, Any]) -> list[str]:
    """Cells of a policy's row, each "-" where it was not measured."""

    def cell(key: str, form: Callable[[Any], str]) -> str:
        return "-" if row.get(key) is None else form(row[key])

    def points(x: float) -> str:
        interval = row.get("difference_interval") or ()
        return f"{100 * x:+.1f}" + (f" ({' to '.join(f'{100 * y:+.1f}' for y in interval)})"
                                    if interval else "")  # fmt: skip

    return [
        cell("accuracy", lambda x: f"{x * row['n']:.3g} of {row['n']}"),
        cell("difference", points),
        cell("density", lambda x: f"{x:.1%}"),
        cell("density_decode", lambda x: f"{x:.1%}"),
        cell("kept_mass", lambda x: f"{x:.1%}"),
        cell("kl", lambda x: f"{x:.2g}"),
        cell("prefill_seconds", lambda x: f"{x:.3g} s"),
        cell("ms_per_token", lambda x: f"{x:.3g} ms"),
        cell("peak_memory_bytes", lambda x: f"{x / 1e6:,.0f} MB"),
    ]


def cpu() -> str:
    """The CPU kernel beside SDPA."""
    rows = rows_of(RESULTS / "cpu.jsonl")
    if not rows:
        return "Not measured yet."
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["variant"]] = row
    first = rows[0]
    lines = [
        "CPU kernel against `scaled_dot_product_attention(is_causal=True)`: 8 heads, 2 kv heads, "
        f"head dim 64,\n{first['device']['name']}, {first['device']['threads']} threads, torch "
        f"{first['versions']['torch']}, selection and lowering included, medians:",
        "",
        "| mask, tokens / w, dtype | dynmask | SDPA | speedup | work | extra memory |",
        "|---|---|---|---|---|---|",
    ]
    for name, variants in cases.items():
        ours, dense = variants["dynmask"], variants["sdpa"]
        lines.append(
            f"| {name} | {ours['median_s']:.2f} s | {dense['median_s']:.2f} s | "
            f"{dense['median_s'] / ours['median_s']:.1f}x | {ours['work']:.1%} | "
            f"{ours['peak_bytes'] / 2**20:.0f} MB |"
        )
    return "\n".join(lines)


def gpu() -> str:
    """Our kernels on a GPU beside dense attention."""
    rows = [r for r in rows_of(RESULTS / "gpu.jsonl") if r["variant"] != "device"]
    cases = _gpu_cases([r for r in rows if r["mask"] not in ("auto", "decode")])
    timed = {name: c for name, c in cases.items() if "median_s" in c.get("dynmask", {})}
    if not timed:
        return "Not measured yet."
    shown = [r for r in rows if r["mask"] != "auto" and r["variant"] in SHOWN]
    lines = [
        *_gpu_head(shown, "selection and lowering included, against cuDNN's causal attention:"),
        "| mask, tokens / w | dynmask | cuDNN | speedup | kept TFLOP/s | selection, lowering |",
        "|---|---|---|---|---|---|",
    ]
    for name, variants in timed.items():
        ours, dense = variants["dynmask"], variants.get("cudnn", {})
        lines.append(
            f"| {name} | {_ms(ours)} | {_ms(dense)} | {_ratio(dense, ours)} | "
            f"{ours['kept_tflops']:.0f} | {ours['share']:.0%} |"
        )
    if any(r.get("extrapolated") for r in rows):
        lines += ["", "\\* not measured: extrapolated by the square of the length."]
    return "\n".join([*lines, *_decode_lines(rows)])


def gpu_full() -> str:
    """Every case and variant on a GPU, those that did not run with the reason."""
    rows = [r for r in rows_of(RESULTS / "gpu.jsonl") if r["variant"] != "device"]
    if not rows:
        return "Not measured yet."
    lines = [
        *_gpu_head(rows, "medians (20 to 80 % quantiles); others' time over ours:"),
        "| case | variant | time | others / ours | extra memory | remarks |",
        "|---|---|---|---|---|---|",
    ]
    for name, variants in _gpu_cases(rows).items():
        ours = variants.get("dynmask", {})
        order = sorted(variants, key=lambda variant: variant != "dynmask")
        lines += [f"| {name} | {v} | {_full_cells(variants[v], ours)} |" for v in order]
    return "\n".join(lines)


def _full_cells(row: dict[str, Any], ours: dict[str, Any]) -> str:
    """Time, ratio, memory and remarks of one variant."""
    if "median_s" not in row:
        return f"- | - | - | {row.get('status', '').replace('|', '/')}"
    time = _ms(row)
    if "q20_s" in row:
        time += f" ({1e3 * row['q20_s']:.3g} to {1e3 * row['q80_s']:.3g})"
    memory = f"{row['peak_bytes'] / 2**20:,.0f} MB" if "peak_bytes" in row else "-"
    ratio = "" if row["variant"] == "dynmask" else _ratio(row, ours)
    return f"{time} | {ratio} | {memory} | {_remarks(row)}"


def _remarks(row: dict[str, Any]) -> str:
    """What else was measured of a variant, in words."""
    words = [row["timing"]] if row.get("timing", "events") != "events" else []
    if "density" in row:
        words.append(f"density {row['density']:.2%}")
    for field, name in (
        ("selection_s", "selection"),
        ("lowering_s", "lowering"),
        ("attention_s", "attention"),
        ("floor_s", "roofline floor"),
        ("mask_s", "its block mask, not in its time,"),
        ("calls_s", "plain calls"),
    ):
        if row.get(field) is not None:
            words.append(f"{name} {1e3 * row[field]:.3g} ms")
    if "bandwidth_share" in row:
        words.append(f"{row['bandwidth_share']:.0%} of a copy's bandwidth")
    words += [row[field] for field in ("form", "how") if field in row]
    if row.get("pairs", "same") not in ("same", "dense"):
        words.append(row["pairs"])
    if row.get("extrapolated"):
        words.append(f"extrapolated from {row['extrapolated_from']}")
    return "; ".join(words)


def _gpu_head(rows: list[dict[str, Any]], words: str) -> list[str]:
    """Device, shapes, ceilings."""
    timed = [r for r in rows if "median_s" in r] or rows
    origins = {(r["device"]["name"], r["versions"]["torch"]) for r in timed}
    assert len(origins) == 1, f"one sentence cannot speak for {origins}"
    device, torch = origins.pop()
    commits = list(dict.fromkeys(r["commit"][:7] for r in timed))
    (limits,) = [r for r in rows_of(RESULTS / "gpu.jsonl") if r["variant"] == "device"] or [{}]
    most = ""
    if limits:
        most = (
            f"; an 8,192-cubed product\nruns at {limits['matmul_tflops']:.0f} TFLOP/s there, a "
            f"copy at {limits['copy_gbps']:,.0f} GB/s"
        )
    return [
        "bfloat16, 32 query heads, 8 kv heads, head dim 128, "
        f"{device}, torch {torch}, commit{'s' * (len(commits) > 1)} {', '.join(commits)}{most};",
        words,
        "",
    ]


def _gpu_cases(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Rows by case and variant, in the order of the registry and not of the last run."""
    order = {case.name: i for i, case in enumerate(CASES)}
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda r: order.get(r["case"], len(order))):
        cases.setdefault(row["case"], {})[row["variant"]] = row
    return cases


def _decode_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Decoding in one sentence."""
    decode = {r["variant"]: r for r in rows if r["mask"] == "decode" and "median_s" in r}
    if "dynmask" not in decode:
        return []
    ours = decode["dynmask"]
    dense = min((r for v, r in decode.items() if v in ("sdpa", "folded")),
                key=lambda r: r["median_s"], default={})  # fmt: skip
    with_list = ours["median_s"] + ours["lowering_s"]
    return [
        "",
        f"Decoding, {ours['width']:,} of {ours['keys']:,} keys, batch 8, attention alone over "
        f"lists made beforehand (CUDA graph):\n{1e6 * ours['median_s']:.0f} µs a layer, "
        f"{ours['bandwidth_share']:.0%} of a copy's bandwidth on the kept bytes; dense SDPA "
        f"{_ms(dense)}, {_ratio(dense, ours)}. A list from lifetimes\ntakes "
        f"{1e6 * ours['lowering_s']:.0f} µs more, {dense['median_s'] / with_list:.0f}x with it.",
    ]


def goals(number: int = 2) -> str:
    """Every target of a part of the work, reached or not."""
    rows = [r for r in rows_of(RESULTS / "headline.jsonl") if r["issue"] == number]
    if not rows:
        return "Not measured yet."
    lines = ["| target | asked | measured | |", "|---|---|---|---|"]
    for row in rows:
        sign = "at least" if row["better"] == "higher" else "at most"
        value = f"{row['value']:.4g}" if row["value"] < 1000 else f"{row['value']:,.0f}"
        what = f"{row['goal']} ({row['metric'].replace('_', ' ')})"
        met = "met" if row["met"] else "**missed**"
        lines.append(f"| {what} | {sign} {row['target']:g} | {value} | {met} |")
    return "\n".join(lines)


def _dma(kind: str) -> tuple[list[str], dict[tuple[str, str], dict[str, Any]]]:
    """Cases of ``dma.jsonl`` of a kind, in their order, and its rows by (case, variant)."""
    rows = [row for row in rows_of(RESULTS / "dma.jsonl") if row["case"].startswith(kind)]
    return list(dict.fromkeys(row["case"] for row in rows)), {
        (row["case"], row["variant"]): row for row in rows
    }


def dma_steps() -> str:
    """A training step of attention: ours, of it the forward, dense kernels, extra memory."""
    cases, by = _dma("train ")
    lines = ["| keys / w | ours | of it selection and forward | cuDNN | FlashAttention-2 | faster "
             "than cuDNN | extra memory: ours / cuDNN / FA2 |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for case in cases:
        names = ("dynmask", "dynmask forward", "cudnn", "fa2")
        ours, _, cudnn, fa2 = times = [by.get((case, name), {}) for name in names]
        peaks = [row.get("peak_bytes") for row in (ours, cudnn, fa2)]
        memory = " / ".join("-" if peak is None else f"{peak / 1e6:,.0f}" for peak in peaks)
        lines.append(f"| {case.removeprefix('train ')} | {' | '.join(map(_ms, times))} | "
                     f"{_ratio(cudnn, ours)} | {memory} MB |")  # fmt: skip
    return "\n".join(lines)


def dma_tokens() -> str:
    """A decoded token of one layer on the device alone and with the host, and the cache."""
    cases, by = _dma("decode ")
    lines = ["| position | bounded cache | with the host | size | SDPA, full cache | with the host "
             "| size |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for case in cases:
        cells = [case.removeprefix("decode at ")]
        for name in ("bounded cache", "sdpa, full cache"):
            row = by.get((case, name), {})
            times = [row.get("device_s"), row.get("median_s")]
            cells += ["-" if time is None else f"{1e6 * time:,.0f} us" for time in times]
            held = row.get("cache_bytes", 0) / 1e6
            cells.append(f"{held:.1f} MB" if held < 10 else f"{held:,.0f} MB" if held else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def dma_prompts() -> str:
    """A prompt through the reference model with DMA layers."""
    cases, by = _dma("prompt ")
    lines = ["| tokens | seconds | peak beside the weights | of it the cache |",
             "|---|---|---|---|"]  # fmt: skip
    for case in cases:
        row = by[case, "reference model with DMA layers"]
        tokens, seconds = case.removeprefix("prompt of "), f"{row['median_s']:.2f}"
        peak, cache = (f"{row[name] / 1e6:.1f} MB" for name in ("peak_bytes", "cache_bytes"))
        lines.append(f"| {tokens} | {seconds} | {peak} | {cache} |")
    return "\n".join(lines)


def trained_alike(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those rows that were trained as long as most were: others are no rows of the same table."""
    found = [(row.get("steps"), row.get("tokens"), row.get("step_tokens")) for row in rows]
    most = Counter(found).most_common(1)
    return [row for row, spent in zip(rows, found, strict=True) if spent == most[0][0]]


def perplexities(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[float]]:
    """Those of each (size, mixer), one a seed, by the best of the grid's rates."""
    best: dict[tuple[str, str], dict[int, float]] = {}
    for row in trained_alike([row for row in rows if "perplexity" in row]):
        seeds = best.setdefault((row["size"], row["mixer"]), {})
        seeds[row["seed"]] = min(seeds.get(row["seed"], math.inf), row["perplexity"])
    return {name: [seeds[seed] for seed in sorted(seeds)] for name, seeds in best.items()}


def scaling() -> str:
    """Perplexity of each mixer at each size, a number for each seed."""
    found = perplexities(rows_of(RESULTS / "scaling.jsonl"))
    mixers = list(dict.fromkeys(mixer for _, mixer in found))
    lines = [f"| size | {' | '.join(mixers)} |", "|---|" + "---|" * len(mixers)]
    for size in dict.fromkeys(size for size, _ in found):
        values = [found.get((size, mixer), []) for mixer in mixers]
        cells = [", ".join(f"{x:.1f}" for x in own) or "-" for own in values]
        lines.append(f"| {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def recalled(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], list[float]]:
    """Associative recall of each (case, tokens, pairs, w, mixer, model width), one a seed.

    Of the grid's two learning rates the better counts.
    """
    best: dict[tuple[Any, ...], dict[int, float]] = {}
    for row in trained_alike([row for row in rows if "accuracy" in row]):
        name = (*row["case"].values(), row["mixer"], row["hidden"])
        seeds = best.setdefault(name, {})
        seeds[row["seed"]] = max(seeds.get(row["seed"], 0.0), row["accuracy"])
    return {name: [seeds[seed] for seed in sorted(seeds)] for name, seeds in best.items()}


def recall(rows: list[dict[str, Any]] | None = None) -> str:
    """Right answers of associative recall in percent: the mean over seeds, and their range."""
    found = recalled(rows_of(RESULTS / "mqar.jsonl") if rows is None else rows)
    mixers = list(dict.fromkeys(name[4] for name in found))
    lines = [f"| case | tokens | pairs | w | model width | {' | '.join(mixers)} |",
             "|" + "---|" * (5 + len(mixers))]  # fmt: skip
    for case, tokens, pairs, width, hidden in sorted({(*n[:4], n[5]) for n in found}):
        cells = []
        for mixer in mixers:
            values = found.get((case, tokens, pairs, width, mixer, hidden), [])
            text = f"{100 * statistics.mean(values):.1f}" if values else "-"
            if len(values) > 1:
                text += f" ({100 * min(values):.1f} to {100 * max(values):.1f})"
            cells.append(text)
        lines.append(f"| {case} | {tokens:,} | {pairs} | {width} | {hidden} | "
                     f"{' | '.join(cells)} |")  # fmt: skip
    return "\n".join(lines)


def recall_tries(
    rows: list[dict[str, Any]] | None = None, base: list[dict[str, Any]] | None = None
) -> str:
    """Right answers in percent: DMA of the other table ("-"), then what was tried, best first."""
    rows = rows_of(RESULTS / "mqar_tries.jsonl") if rows is None else rows
    base = rows_of(RESULTS / "mqar.jsonl") if base is None else base

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return (*row["case"].values(), row["hidden"], row["seed"])

    told = [row for row in rows if "accuracy" in row]
    if not told:
        return "nothing was tried yet"

    def spent(row: dict[str, Any]) -> tuple[Any, ...]:
        return row.get("steps"), row.get("tokens")

    usual = spent(trained_alike(told)[0])
    places = list(dict.fromkeys(map(place, told)))
    as_ever = [{**row, "trial": "-"} for row in base
               if row["mixer"] == "dma" and "accuracy" in row and spent(row) == usual]  # fmt: skip
    best: dict[tuple[str, tuple[Any, ...]], float] = {}
    for row in [*as_ever, *told]:
        key = row["trial"], place(row)
        best[key] = max(best.get(key, 0.0), row["accuracy"])
    heads = [f"{tokens:,} tokens, w {w}, width {hidden}" for _, tokens, _, w, hidden, _ in places]
    lines = ["| tried | " + " | ".join(heads) + " |", "|" + "---|" * (1 + len(places))]
    names = dict.fromkeys(row["trial"] for row in told)
    found = {n: [best[n, at] for at in places if (n, at) in best] for n in names}
    order = sorted(names, key=lambda n: (len(found[n]), statistics.mean(found[n])), reverse=True)
    for name in ["-", *order] if as_ever else order:
        cells = [f"{100 * best[name, at]:.1f}" if (name, at) in best else "-" for at in places]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _ms(row: dict[str, Any]) -> str:
    """A time, marked when it was not measured but extrapolated."""
    if "median_s" not in row:
        return "-"
    ms = 1e3 * row["median_s"]
    digits = 0 if ms >= 100 else 1 if ms >= 10 else 2 if ms >= 1 else 3
    return f"{ms:,.{digits}f} ms" + ("*" if row.get("extrapolated") else "")


def _ratio(dense: dict[str, Any], ours: dict[str, Any]) -> str:
    if "median_s" not in dense or "median_s" not in ours:
        return "-"
    ratio = dense["median_s"] / ours["median_s"]
    return f"{ratio:.0f}x" if ratio >= 100 else f"{ratio:.1f}x" if ratio >= 10 else f"{ratio:.2f}x"


TABLES = {
    "reference": reference,
    "retained": retained,
    "retained-full": retained_full,
    "gated": gated,
    "gated-tasks": gated_tasks,
    "baselines": baselines,
    "million": million,
    "gpus": gpus,
    "vllm": vllm,
    "cpu": cpu,
    "gpu": gpu,
    "gpu-full": gpu_full,
    "goals": goals,
    "scaling": scaling,
    "dma-steps": dma_steps,
    "dma-tokens": dma_tokens,
    "dma-prompts": dma_prompts,
    "recall": recall,
    "recall-tries": recall_tries,
    "goals-dma": lambda: goals(3),
    "goals-generator": lambda: goals(4),
    "goals-long": lambda: goals(5),
}


def text(page: str) -> str:
    """A page with the tables that it has blocks for written anew."""
    for name, table in TABLES.items():
        pattern = f"<!-- {name} -->.*?<!-- /{name} -->"
        if re.search(pattern, page, flags=re.DOTALL):
            block = f"<!-- {name} -->\n{table()}\n<!-- /{name} -->"
            page = re.sub(pattern, lambda _, b=block: b, page, flags=re.DOTALL)
    return page


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0]).parse_args()
    for file in (README, PERFORMANCE, RETAINED, DMA, GENERATOR, LONG, DISTRIBUTED, SERVING):
        if file.exists():
            file.write_text(text(file.read_text()))
