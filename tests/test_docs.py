"""The documents tell the truth: snippets run, numbers agree with their result files."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import tables

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
HEADLINE = ROOT / "benchmarks" / "results" / "headline.jsonl"
FIELDS = {
    "issue", "goal", "metric", "value", "target", "better", "met", "device", "versions", "commit",
    "command", "date",
}  # fmt: skip


def test_the_snippets_of_the_readme_run(tmp_path, monkeypatch):
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
    assert code.count("import") >= 3
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "my-card" / "mask_card.safetensors").is_file()


def test_the_commands_of_the_readme_exist():
    from dynmask.cli import parser

    for line in re.findall(r"^    (dynmask .*)$", README, flags=re.MULTILINE):
        words = re.sub(r'"[^"]*"', "text", line).split()[1:]
        parser().parse_args(words)  # exits with 2 on an unknown command or option


def test_the_tables_of_the_readme_come_from_the_results():
    assert tables.text(README) == README, "run python benchmarks/tables.py"


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
