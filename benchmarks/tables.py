"""Tables of README, written from the result files: ``python benchmarks/tables.py``.

A test runs ``text()`` and compares, so a number in README cannot part from its result.
"""

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.headline import rows_of

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"


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
    for policy in policies:
        row = " | ".join(_cell(cells.get((policy, task))) for task in tasks)
        lines.append(f"| {policy} | {row} |")
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


def text(readme: str) -> str:
    """README with its tables written anew."""
    for name, table in (("reference", reference()), ("cpu", cpu())):
        block = f"<!-- {name} -->\n{table}\n<!-- /{name} -->"
        readme = re.sub(
            f"<!-- {name} -->.*?<!-- /{name} -->", lambda _, b=block: b, readme, flags=re.DOTALL
        )
    return readme


if __name__ == "__main__":
    README.write_text(text(README.read_text()))
