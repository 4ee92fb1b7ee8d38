"""``dynmask serve``: what it refuses before a model is loaded, and the command that it becomes."""

import os
import select
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dynmask
from dynmask import cli
from dynmask.calibrate import DamSettings
from dynmask.cli import serve, supervise
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A model's folder and its cards: DAM and gated."""
    folder = tmp_path_factory.mktemp("serve")
    model = tiny_llama()
    model.save_pretrained(folder / "model")
    documents = list(torch.randint(3, 256, (4, 64), generator=torch.Generator().manual_seed(0)))
    settings = DamSettings(length=64, tau=0.1, mu=0.3)
    card = dynmask.calibrate(model, documents, settings=settings, progress=False)
    card.save_pretrained(folder / "dam")
    return folder


@pytest.fixture
def become(monkeypatch):
    """What the process would have become: the server's command, environment, how it is kept."""
    became = []

    def take(file, command, environment):
        at = command.index("--")
        assert file == sys.executable and command[:3] == [file, "-P", supervise.__file__]
        became.append((command[at + 1 :], environment, command[3:at]))
        raise SystemExit(0)

    monkeypatch.setattr(os, "execvpe", take)
    monkeypatch.setattr(serve, "find_spec", lambda name: object())
    return became


def served(become, *arguments):
    with pytest.raises(SystemExit):
        cli.main(["serve", *(str(a) for a in arguments)])
    return become[-1]


def refused(capsys, *arguments):
    assert cli.main(["serve", *(str(a) for a in arguments)]) == 2
    out, err = capsys.readouterr()
    assert not out and "Traceback" not in err
    return err


def test_the_command_is_printed_and_run(here, become, capsys, monkeypatch):
    monkeypatch.chdir(here)  # vLLM's processes may be started elsewhere
    command, environment, restart = served(
        become, here / "model", "--card", "dam", "--port", 8123, "--", "--max-model-len", 99
    )
    assert command[1:4] == ["-m", "vllm.entrypoints.cli.main", "serve"]
    assert command[4] == str(here / "model")
    assert command[-4:] == ["--port", "8123", "--max-model-len", "99"]
    assert environment["DYNMASK_POLICY"] == f"dam:{(here / 'dam').resolve()}"
    assert restart == ["--restart", "0"]
    said = capsys.readouterr().err
    assert said.strip().endswith(shlex.join(command)) and "DYNMASK_POLICY=dam:" in said


def test_a_card_in_the_environment_does_not_come_between(here, become, monkeypatch):
    monkeypatch.setenv("DYNMASK_CARD", "/another")
    _, environment, *_ = served(become, here / "model", "--policy", "streaming")
    assert "DYNMASK_CARD" not in environment
    assert environment["DYNMASK_POLICY"] == "streaming"


def test_a_policy_may_be_for_prompts_alone(here, become, capsys, monkeypatch):
    monkeypatch.setenv("DYNMASK_PHASE", "both")
    own = here / "model", "--policy", "streaming"
    assert served(become, *own)[1]["DYNMASK_PHASE"] == "both"
    assert served(become, *own, "--phase", "prefill")[1]["DYNMASK_PHASE"] == "prefill"
    assert "DYNMASK_PHASE=prefill" in capsys.readouterr().err


WHOLE = ["--no-enable-chunked-prefill", "--no-enable-prefix-caching"]


def test_prompts_stay_whole_where_the_choice_depends_on_it(here, become):
    model = here / "model"
    assert served(become, model, "--policy", "gated")[0][-2:] == WHOLE
    for own in (
        ["--policy", "gated", "--chunked"],
        ["--policy", "streaming"],
        ["--policy", "full"],
    ):
        assert not set(WHOLE) & set(served(become, model, *own)[0])
    # what a user passes on comes last, and vLLM takes the last
    own = "--policy", "gated", "--", "--enable-prefix-caching"
    assert served(become, model, *own)[0][-3:] == [*WHOLE, "--enable-prefix-caching"]


@pytest.mark.parametrize("given, dense", [([], 16384), (["--dense-up-to", 99], 99), (
    ["--dense-up-to", 0], 0)])  # fmt: skip
def test_short_prompts_of_gated_cards_are_read_whole(here, become, monkeypatch, given, dense):
    """The policy's text form carries it, so that transformers can be asked the same."""
    monkeypatch.setattr("dynmask.integrations.vllm.settings.policy_of_card", lambda p: f"gated:{p}")
    monkeypatch.setattr(serve, "_check", lambda *a: None)
    monkeypatch.setattr(serve, "command_of", lambda *a, **k: ["it"])
    _, environment, *_ = served(become, here / "model", "--card", "owner/name", *given)
    expected = "gated:owner/name" + (f",dense_up_to={dense}" if dense else "")
    assert environment["DYNMASK_POLICY"] == expected


def test_the_backend_is_named_where_there_is_a_gpu(here, become, monkeypatch):
    monkeypatch.setattr(serve, "_has_gpu", lambda: True)
    command, *_ = served(become, here / "model", "--policy", "streaming")
    assert command[5:7] == ["--attention-backend", "CUSTOM"]
    monkeypatch.setattr(serve, "_has_gpu", lambda: False)
    assert "CUSTOM" not in served(become, here / "model", "--policy", "streaming")[0]


def test_nothing_runs_when_it_is_only_to_be_printed(here, capsys, monkeypatch):
    monkeypatch.setattr(os, "execvpe", None)
    monkeypatch.setattr(serve, "_has_gpu", lambda: False)
    own = "serve", str(here / "model"), "--policy", "streaming", "--print-only"
    assert cli.main(list(own)) == 0
    said = capsys.readouterr()
    assert "vllm.entrypoints.cli.main serve" in said.out
    assert "add --attention-backend CUSTOM" in said.err


def test_a_hostile_card_is_refused_before_anything_else(here, become, capsys, tmp_path):
    (tmp_path / "mask_card.safetensors").write_bytes(b"\xff" * 64)
    assert "mask card" in refused(capsys, "no/such/model/here", "--card", tmp_path)
    assert not become


def test_a_card_of_other_weights_is_refused(here, become, capsys, tmp_path):
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    assert "the weights that it was calibrated on" in refused(
        capsys, tmp_path / "other", "--card", here / "dam"
    )
    tiny_llama(layers=3).save_pretrained(tmp_path / "deeper")
    assert "(layers 2)" in refused(capsys, tmp_path / "deeper", "--card", here / "dam")
    assert not become


@pytest.mark.parametrize(
    "own, message",
    [
        (["--policy", "nonsense"], "expected one of"),
        (["--policy", "snapkv"], "several sequences at a time"),
        (["--policy", "gated:decode=keep"], "'full' or 'select' under vLLM"),
        (["--policy", "streaming", "--dense-up-to", "9"], "beside --card"),
    ],
)
def test_policies_that_cannot_be_served(here, become, capsys, own, message):
    assert message in refused(capsys, here / "model", *own)
    assert not become


def test_a_dam_card_takes_no_dense_up_to(here, become, capsys):
    own = here / "model", "--card", here / "dam", "--dense-up-to", 9
    assert "for a gated card" in refused(capsys, *own)


def test_a_model_that_is_not_here(become, capsys):
    assert "MODEL: expected a folder" in refused(capsys, "no/such/place", "--policy", "streaming")


def test_without_vllm_the_remedy_is_named(here, monkeypatch, capsys):
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert cli.main(["serve", str(here / "model"), "--policy", "streaming"]) == 1
    assert "pip install 'dynmask[vllm]'" in capsys.readouterr().err


def test_a_converted_model_is_served_by_its_own_scores(here, become, capsys, tmp_path):
    assert "not converted" in refused(capsys, here / "model", "--policy", "dma")
    dynmask.convert(tiny_llama(), width=20, window=8).save_pretrained(tmp_path / "converted")
    command, environment, *_ = served(
        become, tmp_path / "converted", "--policy", "dma", "--", "--x"
    )
    assert command[-3:] == ["--load-format", "dynmask", "--x"]
    assert environment["DYNMASK_POLICY"] == "dma"


def test_other_commands_pass_nothing_on():
    with pytest.raises(SystemExit) as stop:
        cli.main(["inspect", "card", "--", "--port", "1"])
    assert stop.value.code == 2


PASSED_ON = "--max-model-len", "99", "--enforce-eager", "-tp", "2"


def test_options_of_vllm_go_to_it(here, become):
    """With -- or without, between ours or after them, in their order."""
    model, own = here / "model", ("--policy", "streaming", "--port", "1")
    for arguments in (
        (model, *own, *PASSED_ON),
        (model, *own, "--", *PASSED_ON),
        (model, *PASSED_ON[:2], *own, *PASSED_ON[2:]),
        (*own, model, *PASSED_ON[:2], "--", *PASSED_ON[2:]),
    ):
        assert served(become, *arguments)[0][4:] == [str(model), "--port", "1", *PASSED_ON]


@pytest.mark.parametrize(
    "before, after, message",
    [
        (["--max-model-len", "99"], [], "expected MODEL before vLLM's own options"),
        (["--enforce-eager"], [], "received --enforce-eager"),
        ([], ["my-card"], "unrecognized arguments: my-card"),
        ([], ["--restart", "-1"], "at least 0"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(here, become, capsys, before, after, message):
    own = "serve", *before, str(here / "model"), "--policy", "streaming", *after
    with pytest.raises(SystemExit) as stop:
        cli.main(own)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not become


def test_other_commands_refuse_what_they_do_not_know(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["inspect", "card", "--max-model-len", "1"])
    assert stop.value.code == 2 and "--max-model-len" in capsys.readouterr().err


# A server: it notes that it was started, and with what ends it, one start after the other.
SERVER = """import os, signal, subprocess, sys, time
from pathlib import Path
note, *ends = sys.argv[1:]
with open(note, "a") as file:
    file.write(f"{os.getpid()}\\n")
end = ends[min(len(Path(note).read_text().split()), len(ends)) - 1]
if end == "orphan":
    engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(note + ".engine").write_text(str(engine.pid))
    os.kill(os.getpid(), signal.SIGKILL)
if end == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    print("ready", flush=True)
    time.sleep(600)
sys.exit(int(end))
"""


def heard_signals():
    """Signals end a process again, though who started the tests (nohup, a script) ignores some."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def kept(tmp_path, restart, *ends, nohup=()):
    """A supervisor with a server that ends so, and the file that counts starts."""
    note = tmp_path / "starts"
    server = [sys.executable, "-c", SERVER.replace("\\\\", "\\"), str(note), *ends]
    process = subprocess.Popen(
        [*nohup, *supervise.command_of(server, restart)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heard_signals,
    )  # fmt: skip
    return process, note


@pytest.mark.parametrize(
    "restart, ends, code, starts, said",
    [
        (0, ["0"], 1, 1, "ended by itself, with exit code 0 (an error of its engine"),
        (0, ["7"], 7, 1, "or let --restart N do that"),
        (2, ["0"], 1, 3, "(2 of 2)"),
        (2, ["1"], 1, 3, "giving up"),
        (2, ["2"], 2, 1, ""),  # what is wrong with its options it says itself
        (1, ["orphan", "3"], 3, 2, "killed by SIGKILL; starting it again (1 of 1)"),
        (0, ["orphan"], 137, 1, "killed by SIGKILL"),
    ],
)
def test_a_server_that_ends_by_itself(tmp_path, restart, ends, code, starts, said):
    """Never a success, started again as often as was asked for, a wrong option never."""
    process, note = kept(tmp_path, restart, *ends)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, len(note.read_text().split())) == (code, starts), err
    assert said in err
    engine = Path(f"{note}.engine")
    if engine.exists():  # nothing of the dead server stays behind
        assert ended(int(engine.read_text()))


def ended(process):
    """Whether it is gone, or dead and not yet fetched by whoever adopted it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_that_is_stopped_is_not_started_again(tmp_path, number):
    process, note = kept(tmp_path, 3, "1", "wait")  # the second one lives
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and len(note.read_text().split()) == 2
    assert "(1 of 3)" in err and "(2 of 3)" not in err


@pytest.mark.parametrize("nohup, code", [(False, 129), (True, 0)])
def test_a_terminal_that_is_closed(tmp_path, nohup, code):
    """It ends the server, but for one that was started to outlive it."""
    process, _ = kept(tmp_path, 3, "wait", nohup=["nohup"] * nohup)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    if nohup:
        process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == code


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone tells a process")
def test_a_server_whose_supervisor_is_killed_stops(tmp_path):
    process, note = kept(tmp_path, 3, "wait")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    server = os.pidfd_open(int(note.read_text()))
    process.kill()
    process.communicate(timeout=60)
    assert select.select([server], [], [], 60)[0]  # readable when it has ended
    os.close(server)


def test_the_supervisor_imports_nothing_heavy():
    code = f"import runpy, sys; runpy.run_path({supervise.__file__!r}); print(*sys.modules)"
    own = [sys.executable, "-P", "-c", code]
    said = subprocess.run(own, capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "dynmask", "numpy", "transformers"} & set(said)


def test_a_log_does_not_tell_secrets():
    command = ["vllm", "serve", "m", "--api-key", "one", "two", "--port", "80", "--hf-token=three"]
    shown = serve.without_secrets(command)
    assert shown == ["vllm", "serve", "m", "--api-key", "***", "***", "--port", "80",
                     "--hf-token=***"]  # fmt: skip
    assert serve.without_secrets(command[:3] + command[6:8]) == command[:3] + command[6:8]
