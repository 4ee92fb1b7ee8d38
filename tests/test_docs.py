"""The documents tell the truth: snippets run, numbers agree with their result files."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import dynmask
from benchmarks import tables
from dynmask import MaskCard

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
HEADLINE = ROOT / "benchmarks" / "results" / "headline.jsonl"
FIELDS = {
    "issue", "goal", "metric", "value", "target", "better", "met", "device", "versions", "commit",
    "command", "date",
}  # fmt: skip


VLLM = {"--max-model-len", "--dtype", "--tensor-parallel-size"}
"""Options of vLLM's own that the documents show."""


def test_the_snippets_of_the_readme_run(tmp_path, monkeypatch):
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
    assert code.count("import") >= 3
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "first-card" / "mask_card.safetensors").is_file()
    # "a tenth of the memory, the same answer"
    model, tokens = names["model"], names["inputs"]["input_ids"].shape[1]
    heads = model.config.num_hidden_layers * model.config.num_key_value_heads
    whole = heads * tokens * 2 * model.config.head_dim * model.dtype.itemsize
    assert names["answer"].strip() == names["question"].answers[0]
    assert 9 < whole / names["cache"].nbytes < 12


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_the_commands_of_the_documents_exist(page):
    from dynmask.cli import parser

    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^    (dynmask .*)$", text, flags=re.MULTILINE):
        # exits with 2 on an unknown command; an unknown option of serve goes to vLLM
        words = shlex.split(line.partition(" -- ")[0])[1:]
        _, unknown = parser().parse_known_args(words)
        assert {w for w in unknown if w.startswith("-")} <= (VLLM if words[0] == "serve" else set())


@pytest.mark.parametrize(
    "page",
    [
        tables.README,
        tables.PERFORMANCE,
        tables.RETAINED,
        tables.DMA,
        tables.GENERATOR,
        tables.LONG,
        tables.DISTRIBUTED,
        tables.SERVING,
    ],
)
def test_tables_come_from_the_results(page):
    text = page.read_text(encoding="utf-8")
    assert tables.text(text) == text, "run python benchmarks/tables.py"


def test_what_the_readme_says_of_the_retained_cache():
    rows = {
        (r["policy"], r["width"], r["task"], r["length"]): r
        for r in tables.rows_of(tables.RESULTS / "retrofit.jsonl")
    }
    table = tables.retained()
    for length, tasks in tables.ASKED:
        assert f"| {length:,} tokens: cache | " in table
        for _, policy, width in tables.CACHES:
            for task in tasks:
                assert f"| {rows[policy, width, task, length]['accuracy']:.0%} |" in table
    assert "Records do not compress" in table


@pytest.mark.parametrize("width", [256, 512])
def test_the_shipped_card_is_the_one_that_was_measured(width):
    """Its widths explain the densities of the results."""
    widths = MaskCard.from_pretrained(tables.CARD).policy(width=width, budget="per_head").width
    assert sum(map(sum, widths)) == width * sum(map(len, widths))
    n = 16_384
    kept = [w * (w + 1) / 2 + (n - w) * w for layer in widths for w in layer]
    expected = sum(kept) / len(kept) / (n * (n + 1) / 2)
    (density,) = {
        r["density"]
        for r in tables.rows_of(tables.RESULTS / "retrofit.jsonl")
        if (r["policy"], r["width"], r["length"]) == ("retained pair per head", width, n)
        and r["task"] == "needle"
    }
    assert density == pytest.approx(expected, rel=0.005)  # prompts are a little shorter than n


@torch.inference_mode()
def test_the_size_of_the_retained_cache_is_that_of_a_real_one():
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tables.MODEL, dtype=torch.float32)
    policy = MaskCard.from_pretrained(tables.CARD).policy(width=256, budget="per_head")
    with dynmask.sparsify(model.eval(), policy) as run:
        cache = dynmask.BoundedCache(run)
        model.base_model(torch.arange(700)[None], past_key_values=cache)
    few = 64 * model.config.num_hidden_layers  # two counters and the widths of each layer
    assert 0 < cache.nbytes - tables.bounded_bytes(256, 4) < few


@pytest.mark.parametrize(
    "page, beside, carried",
    [("long_prompts.md", {"snapkv"}, {"h2o"}), ("serving.md", set(), set())],
)
def test_the_documents_tell_alike_which_policies_a_cut_changes(page, beside, carried):
    """Rows: never, at whole blocks not, always; by what the policies say of themselves.

    Some are never changed where a cache carries what they choose by, which vLLM's does not.
    """
    from dynmask.policies import FIXED, Dam, Retained
    from dynmask.policies.base import grid_of

    kinds: list[set[str]] = [set(), set(), set()]
    for name, policy in FIXED.items():
        grid = grid_of(policy())
        kinds[0 if grid == 1 else 1 if grid else 2].add(name)
    assert Dam.causal and Retained.causal
    kinds[0] |= {Dam.name, Retained.name}
    kinds[0] |= carried
    kinds[2] = kinds[2] - {"snapkv"} - carried | beside
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    first = text.index("| `full`, `streaming`")
    told = []
    for line in text[first:].splitlines()[:3]:
        names = line.split("|")[1].replace("`gated` with maps of blocks alone", "")
        told.append(set(re.findall(r"`(\w+)`", names)) - {"dma"})
    assert told == kinds


def test_every_policy_has_its_row_in_the_readme():
    from dynmask.policies import NAMES

    for name in NAMES:
        assert re.search(rf"^\| `{name}[`:]", README, flags=re.MULTILINE), name


@pytest.mark.skipif(not HEADLINE.exists(), reason="nothing was measured yet")
def test_headline_rows_are_whole_and_say_whether_the_goal_was_met():
    for line in HEADLINE.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert row.keys() >= FIELDS, row
        better = row["value"] >= row["target"]
        if row["better"] == "lower":
            better = row["value"] <= row["target"]
        assert row["met"] == better, row
        assert row["met"] or row.get("note"), f"a goal that was missed says why: {row['goal']}"


def test_nothing_links_to_a_file_that_is_not_there():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!http|#)([^)#]+)\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("file", sorted(tables.RESULTS.glob("*.jsonl")), ids=lambda file: file.name)
def test_results_name_no_place_of_the_machine_that_measured(file):
    found = re.search(r'"(/|~|[A-Z]:\\\\)\w[^"]*"', file.read_text(encoding="utf-8"))
    assert found is None, found and found.group()
