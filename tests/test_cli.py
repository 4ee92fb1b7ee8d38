"""The command line: every command on a stand-in model, exit codes, one clear line per error."""

import argparse
import hashlib
import io
import json
import re
import subprocess
import sys
import warnings

import pytest
import torch

from dynmask import cli
from dynmask.cli.common import by_options, policy_label, resolve_policy
from dynmask.cli.texts import documents, texts
from dynmask.policies import Streaming
from tests.stand_in import save_stand_in, stand_in_tokenizer

COMMANDS = ("calibrate", "generate", "evaluate", "inspect", "serve")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_stand_in(tmp_path_factory.mktemp("model") / "stand-in"))


@pytest.fixture(scope="module")
def card(model, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("card") / "mine")
    assert dynmask("calibrate", "--model", model, "--out", folder, *SMALL) == 0
    return folder


SMALL = ("--length", "64", "--tau", "0.1", "--min-support", "8", "--documents", "3", "--quiet")


def dynmask(*arguments):
    return cli.main([str(a) for a in arguments])


def refused(capsys, *arguments, code=2):
    """The one line that a refused call leaves on standard error."""
    assert dynmask(*arguments) == code
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    lines = err.strip().splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) == (1 if code == 2 else 2)
    return lines[0]


# --- the frame ---------------------------------------------------------------------------------


def test_help_is_light():
    """No library of models, tokenizers or pictures is loaded to say what there is."""
    code = (
        "import sys, dynmask.cli\n"
        "try: dynmask.cli.main(['evaluate', '--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'transformers', 'matplotlib', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        dynmask(command, "--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "examples:" in text and f"dynmask {command}" in text and "--debug" in text
    examples = text.partition("examples:")[2]
    assert not re.search(r"\S {2,}--", examples), "a line goes on with a backslash that is printed"


def test_version_and_no_command(capsys):
    import dynmask as package

    with pytest.raises(SystemExit) as stop:
        dynmask("--version")
    assert stop.value.code == 0 and package.__version__ in capsys.readouterr().out
    assert dynmask() == 2
    assert all(command in capsys.readouterr().out for command in COMMANDS[:1])


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["evaluate", "--task", "lines"],
        ["evaluate", "--model", "m", "--task", "chess"],
        ["evaluate", "--model", "m", "--task", "lines", "--n", "0"],
        ["generate", "--model", "m", "--prompt", "a", "--file", "b"],
    ],
)
def test_wrong_usage_exits_with_2(arguments):
    with pytest.raises(SystemExit) as stop:
        dynmask(*arguments)
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--model", "no/such/folder", "--prompt", "a"], "no/such/folder"),
        (["generate", "--model", "m/m", "--prompt", " "], "empty"),
        (["generate", "--model", "m/m", "--file", "missing.txt"], "missing.txt"),
        (["generate", "--model", "m/m", "--prompt", "a", "--policy", "nope"], "vertical_slash"),
        (["generate", "--model", "m/m", "--prompt", "a", "--policy", "streaming:w=1"], "window"),
        (["generate", "--model", "m/m", "--prompt", "a", "--temperature", "-1"], "temperature"),
        (["generate", "--model", "m/m", "--prompt", "a", "--device", "toaster"], "toaster"),
        (["evaluate", "--model", "m/m", "--task", "longeval"], "longeval-file"),
        (["evaluate", "--model", "m/m", "--task", "lines", "--text", "x"], "--text"),
        (["evaluate", "--model", "m/m", "--task", "lines", "--longeval-file", "x"], "longeval"),
        (["evaluate", "--model", "m/m", "--task", "perplexity", "--length", "9", "99"], "length"),
        (["inspect"], "card"),
        (["inspect", "a", "--model", "b"], "both"),
        (["inspect", "nowhere"], "nowhere"),
        (["inspect", "--model", "m/m", "--prompt", "a"], "--policy"),
        (["inspect", "x", "--out", "picture.exe"], "picture.exe"),
        (["calibrate", "--model", "m/m", "--out", "o", "--text", "nowhere"], "nowhere"),
        (["calibrate", "--model", "m/m", "--out", "o", "--tau", "-1"], "tau"),
    ],
)
def test_bad_input_is_one_line_and_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tau", "-1"], "--tau: expected more than 0, received -1.0."),
        (["--length", "8", "--min-support", "9"],
         "--min-support: expected 1 to length (8), received 9. No pattern has more cells than "
         "that: lower --min-support or raise --length."),
        (["--amplifier", "loud"], "--amplifier: expected one of box_cox"),
        (["--policy", "retained", "--minutes", "0"], "--minutes: expected more than 0"),
        (["--policy", "retained", "--lengths", "9"], "--lengths: expected whole numbers of"),
        (["--policy", "retained", "--width", "9"],
         "--width: expected at least window and sinks (132), received 9. Raise --width or lower "
         "--window."),
        (["--policy", "retained", "--sinks", "-1"], "--sinks: expected a whole number"),
        (["--policy", "retained", "--checkpoint", "max_kl.txt"],
         "--checkpoint: expected a file that a run with these settings left, received max_kl.txt, "
         "which cannot be read"),
        (["--policy", "gated", "--max-kl", "0"], "--max-kl: expected a number above 0"),
        (["--policy", "gated", "--density", "2"], "--density: expected a number above 0"),
        (["--policy", "gated", "--sinks", "-1"], "--sinks: expected a whole number below 2**31"),
        (["--policy", "gated", "--guard", "2"], "--guard: expected a share from 0 to 1, or None"),
        (["--policy", "gated", "--soft", "--strength", "-1"], "--strength: expected a finite num"),
        (["--policy", "gated", "--soft", "--blocks"],
         "--soft: expected budgets without blocks and diagonals, which have no bias, received some "
         "with. Offer columns alone (dynmask.budgets.BUDGETS), or leave --soft out."),
        (["--policy", "gated", "--soft", "--decoded", "--decode", "keep"],
         "--soft: expected decode='full' or 'select'"),
        (["--policy", "gated", "--encoder", "--rank", "99999"], "--rank: expected a whole number"),
    ],
)  # fmt: skip
def test_errors_name_the_options_of_settings(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "max_kl.txt").write_text("no checkpoint")
    line = refused(capsys, "calibrate", "--model", "m/m", "--out", "o", *arguments)
    assert line.startswith(f"error: {message}") and "settings." not in line


def test_other_commands_name_their_options_too(model, capsys):
    asked = ["--model", model, "--quiet"]
    few = ["evaluate", *asked, "--task", "lines", "--length", "20", "--n", "1"]
    assert refused(capsys, *few, "--no-timing").startswith("error: --length: expected at least")
    for command in (["generate", "--prompt", "a"], ["inspect", "--prompt", "a"]):
        line = refused(capsys, *command, *asked, "--policy", "nope")
        assert line.startswith("error: --policy: expected one of full, ")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_setting_of_a_command_is_named_by_its_option(command):
    top = cli.parser()
    (commands,) = (x for x in top._actions if isinstance(x, argparse._SubParsersAction))
    own = commands.choices[command]
    given = argparse.Namespace(policy="gated:card", text=[], prompt=None, file="prompt")
    for action in own._actions:
        name = action.dest
        said = by_options(f"settings.{name}: expected more, received it", own, given)
        option, _, rest = said.partition(": ")
        assert option in action.option_strings or option == action.metavar, said
        assert rest == "expected more, received it"
    for other in (
        "mask card: expected settings.length of at least 2, received 1",  # not what was typed
        "policy gated: expected decode as int, received 'max_kl'",
        "settings.hidden_size: expected more, received less",
        "prompt: expected at least 2 tokens, received 1",  # --file gave it
        "--out: expected a folder, received max_kl",
        "text: expected at least 9 tokens, received 1",
        "documents[3]: expected tokens, received max_kl",
        "no space left",
    ):
        assert by_options(other, own, given) == other
    assert by_options("policy: expected x", own, given) == "--policy: expected x"


def test_what_was_typed_stays_and_switches_that_are_off_are_not_given():
    own = next(x for x in cli.parser()._actions if isinstance(x, argparse._SubParsersAction))
    given = argparse.Namespace(checkpoint="max_kl", blocks=False)
    text = "checkpoint: expected what max_kl left, received max_kl, which is none; raise max_kl"
    assert by_options(text, own.choices["calibrate"], given) == (
        "--checkpoint: expected what --max-kl left, received max_kl, which is none; raise --max-kl"
    )
    text = "blocks: expected query [b, h, q, d], received (1, 2)"
    assert by_options(text, own.choices["calibrate"], given) == text


def test_names_of_the_library_become_options_where_they_are_no_words():
    top = cli.parser()
    (commands,) = (x for x in top._actions if isinstance(x, argparse._SubParsersAction))
    text = (
        "settings.density: expected at least 1, which max_kl 2 allows, received 'max_kl' of "
        "/out/max_kl and max_kl.txt. Raise max_kl. Leave blocks out, or leave out the encoder; "
        "settings.rank is out of its depth, a density of 2 is one; lower hidden_size."
    )
    said = by_options(text, commands.choices["calibrate"], argparse.Namespace())
    assert said == (
        "--density: expected at least 1, which --max-kl 2 allows, received 'max_kl' of "
        "/out/max_kl and max_kl.txt. Raise --max-kl. Leave --blocks out, or leave out the encoder; "
        "--rank is out of its depth, a density of 2 is one; lower hidden_size."
    )


def test_failures_exit_with_1_and_debug_shows_where(capsys, monkeypatch):
    def broken(arguments):
        raise RuntimeError("the disk\nis full")

    monkeypatch.setattr("dynmask.cli.inspect.run", broken)
    assert refused(capsys, "inspect", "x", code=1) == "error: the disk is full"
    assert dynmask("inspect", "x", "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


def test_warnings_are_notes_of_one_line(capsys, monkeypatch):
    def warned(arguments):
        warnings.warn("guard: widened\nfor this call", stacklevel=1)
        return 0

    monkeypatch.setattr("dynmask.cli.inspect.run", warned)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        shown = warnings.showwarning
        assert dynmask("inspect", "x") == 0
        assert warnings.showwarning is shown
    assert capsys.readouterr().err == "note: guard: widened for this call\n"


def test_the_package_runs_as_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "dynmask", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("dynmask")


def test_ctrl_c_exits_with_130(capsys, monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("dynmask.cli.inspect.run", interrupted)
    assert dynmask("inspect", "x") == 130
    assert "Traceback" not in capsys.readouterr().err


def test_full_is_the_models_own_attention():
    assert resolve_policy("full") is None
    assert resolve_policy("streaming:sinks=4,window=9") == Streaming(sinks=4, window=9)
    assert policy_label("dam:some/where/card-a/") == "dam:card-a"
    assert policy_label("streaming:window=9") == "streaming:window=9"
    assert policy_label("gated:some/where/card-b") == "gated:card-b"
    assert policy_label("gated:window=9,last=3") == "gated:window=9,last=3"
    assert policy_label("gated") == "gated"


# --- calibrate and inspect ---------------------------------------------------------------------


def test_calibrate_writes_a_card_and_refuses_to_replace_it(model, card, capsys):
    from dynmask import MaskCard

    assert MaskCard.from_pretrained(card).length == 64
    again = ("calibrate", "--model", model, "--out", card, *SMALL)
    assert "--force" in refused(capsys, *again)
    assert dynmask(*again, "--force", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["policy"] == "dam" and data["settings"]["tau"] == 0.1
    assert data["data"]["documents"] == 3


def test_calibrate_needs_a_document_that_is_long_enough(model, tmp_path, capsys):
    short = tmp_path / "short.txt"
    short.write_text("too short")
    out = tmp_path / "card"
    call = ("calibrate", "--model", model, "--out", out, "--text", short, *SMALL)
    assert "smaller --length" in refused(capsys, *call)
    assert not out.exists()


def test_inspect_describes_and_draws_a_card(card, tmp_path, capsys):
    picture = tmp_path / "masks.png"
    assert dynmask("inspect", card, "--out", picture, "--length", "96") == 0
    text = capsys.readouterr().out
    assert "2 layers, 4 heads" in text and "tau 0.1" in text and "mean" in text
    assert picture.stat().st_size > 5000
    assert dynmask("inspect", card, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["density"]) == 2


def test_inspect_draws_the_masks_of_a_prompt(model, tmp_path, capsys):
    picture = tmp_path / "masks.svg"
    prompt = "for item in items: print(item) " * 10
    call = ("inspect", "--model", model, "--policy", "streaming:sinks=1,window=8", "--quiet")
    assert dynmask(*call, "--prompt", prompt, "--out", picture) == 0
    assert "density" in capsys.readouterr().out
    assert b"<svg" in picture.read_bytes()[:2000]
    assert dynmask(*call, "--prompt", prompt, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert 0 < data["density"] < 1 and len(data["kept_mass_per_head"]) == 2


def test_texts_come_from_files_folders_patterns_and_json_lines(tmp_path):
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.md").write_text("second")
    (tmp_path / "c.py").write_text("not taken from a folder")
    (tmp_path / "d.jsonl").write_text('{"body": "third"}\n\n{"body": "fourth"}\n')
    assert list(texts([str(tmp_path)], "body")) == ["first", "second", "third\n\nfourth"]
    assert list(texts([str(tmp_path / "*.md"), str(tmp_path / "a.txt")], "text")) == [
        "second",
        "first",
    ]
    with pytest.raises(ValueError, match=r"d\.jsonl:1.*--field"):
        list(texts([str(tmp_path / "d.jsonl")], "text"))
    assert len(list(texts([], "text"))) == 1


def test_documents_are_full_disjoint_and_repeatable():
    tokenizer = stand_in_tokenizer()
    sources = [" ".join(str(i) for i in range(400)), "short", "x y z " * 300]
    pieces = documents(tokenizer, sources, 50, 6, 0)
    assert len(pieces) == 6 and all(len(piece) == 50 for piece in pieces)
    again = documents(tokenizer, sources, 50, 6, 0)
    assert all(torch.equal(a, b) for a, b in zip(pieces, again, strict=True))
    everything = documents(tokenizer, sources[:1], 50, 10**6, 0)
    joined = torch.cat(everything).tolist()
    assert joined == tokenizer(sources[0])["input_ids"][: len(joined)]


# --- generate ----------------------------------------------------------------------------------


def test_generate_streams_what_transformers_generates(model, capsys, monkeypatch):
    from tests.stand_in import stand_in_model

    tokenizer = stand_in_tokenizer()
    ids = tokenizer("def f(x):", return_tensors="pt")["input_ids"]
    new = stand_in_model().generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :]
    expected = tokenizer.decode(new, skip_special_tokens=True)
    call = ("generate", "--model", model, "--max-new-tokens", "9", "--quiet")
    assert dynmask(*call, "--prompt", "def f(x):") == 0
    out, err = capsys.readouterr()
    assert out == expected + "\n"
    assert "policy full" in err and "tokens" in err
    monkeypatch.setattr("sys.stdin", io.StringIO("def f(x):"))
    assert dynmask(*call, "--json", "--policy", "streaming:sinks=1,window=4") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["new_tokens"] == 9 and data["ms_per_token"] > 0
    assert 0 < data["density_decode"] < 1 and data["policy"] == "streaming:sinks=1,window=4"


@pytest.mark.parametrize(("tokens", "told"), [(4090, True), (4000, False)])
def test_generate_tells_of_prompts_beyond_the_models_positions(
    model, capsys, monkeypatch, tokens, told
):
    ids = torch.full((1, tokens), 5)
    monkeypatch.setattr("dynmask.cli.generate._encode", lambda *_: ids)
    call = ("generate", "--model", model, "--prompt", "a", "--max-new-tokens", "7", "--json")
    assert dynmask(*call, "--policy", "streaming:window=8", "--quiet") == 0
    assert ("beyond the 4096 positions" in capsys.readouterr().err) is told


def test_generate_refuses_a_chat_without_template_and_a_foreign_card(model, card, tmp_path, capsys):
    from tests.tiny import tiny_llama

    call = ("generate", "--prompt", "a", "--quiet", "--model")
    assert "--chat: expected" in refused(capsys, *call, model, "--chat")
    other = tmp_path / "other"
    tiny_llama(seed=1, vocab_size=400).save_pretrained(other)
    stand_in_tokenizer().save_pretrained(other)
    assert "fingerprint" in refused(capsys, *call, other, "--policy", f"dam:{card}")


# --- evaluate ----------------------------------------------------------------------------------

QUICK = ("--length", "448", "--n", "2", "--timing-items", "1", "--timing-tokens", "3", "--quiet")


def test_evaluate_writes_table_json_pictures_and_resumes(model, card, tmp_path, capsys):
    call = ("evaluate", "--model", model, "--task", "needle", *QUICK, "--out", tmp_path / "out")
    call += ("--policy", "full", "--policy", f"dam:{card}", "--policy", "streaming:window=64")
    assert dynmask(*call) == 0
    table = capsys.readouterr().out
    assert "dam:mine" in table and "streaming:window=64" in table and "0/2" in table
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "needle.json",
        "needle.txt",
        "needle.journal.jsonl",
        "report.html",
        "needle-pareto.png",
        "needle-heatmap.png",
        "needle-heads.png",
    }
    first = json.loads((tmp_path / "out" / "needle.json").read_text())
    assert dynmask(*call, "--no-plots", "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["rows"] == first["rows"] and again["timing"] == first["timing"]


def test_evaluate_reports_what_was_finished_when_stopped(model, tmp_path, capsys, monkeypatch):
    from dynmask.evals.lines import Lines

    real, seen = Lines.score, []

    def impatient(self, item, text):
        seen.append(item)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(self, item, text)

    monkeypatch.setattr(Lines, "score", impatient)
    call = ("evaluate", "--model", model, "--task", "lines", *QUICK, "--no-timing", "--no-plots")
    assert dynmask(*call, "--out", tmp_path) == 130
    assert "interrupted" in capsys.readouterr().out
    report = json.loads((tmp_path / "lines.json").read_text())
    assert report["complete"] is False and len(report["items"]) == 2


def test_evaluate_reads_longeval_files(model, tmp_path, capsys):
    for count in (3, 5):
        lines = [
            {
                "prompt": f"line a-b: <7> {'x ' * count} what is it?",
                "random_idx": ["a-b", 0],
                "expected_number": 7,
                "num_lines": count,
            }
        ]
        (tmp_path / f"{count}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    files = [tmp_path / "3.jsonl", tmp_path / "5.jsonl"]
    call = ("evaluate", "--model", model, "--task", "longeval", "--longeval-file", *files)
    assert dynmask(*call, "--n", "1", "--no-timing", "--policy", "full", "--json", "--quiet") == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["group"] for row in report["rows"]] == ["3 lines", "5 lines"]
    assert report["items"][0]["meta"]["answer_prefix"].endswith("a-b is <")


def test_evaluate_measures_perplexity_of_a_file(model, tmp_path, capsys):
    text = tmp_path / "book.txt"
    text.write_text("once upon a time there was a mask. " * 60)
    call = ("evaluate", "--model", model, "--task", "perplexity", "--text", text, "--length", "300")
    assert dynmask(*call, "--n", "1", "--quiet") == 0
    table = capsys.readouterr().out
    assert "0-256" in table and "256-300" in table and "streaming" in table
    assert dynmask(*call, "--n", "1", "--quiet", "--policy", "full", "--json") == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert settings["text_sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()


@pytest.mark.parametrize("below", ["", "sub"])
def test_an_output_folder_that_cannot_be_is_refused_before_the_model_loads(
    below, tmp_path, capsys, monkeypatch
):
    taken = tmp_path / "file"
    taken.write_text("no folder")
    monkeypatch.setattr("dynmask.cli.calibrate.load", lambda *_: pytest.fail("loaded a model"))
    monkeypatch.setattr("dynmask.cli.evaluate.load", lambda *_: pytest.fail("loaded a model"))
    out = ("--model", "nowhere", "--out", taken / below)
    assert "expected a folder that can be written" in refused(capsys, "calibrate", *out)
    assert "expected a folder that can be written" in refused(
        capsys, "evaluate", "--task", "needle", *out
    )
