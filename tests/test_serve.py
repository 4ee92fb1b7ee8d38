"""``dynmask serve``: what it refuses before a model is loaded, and the command that it becomes."""

import os
import shlex

import pytest
import torch

import dynmask
from dynmask import cli
from dynmask.calibrate import DamSettings
from dynmask.cli import serve
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
    """What the process would have become: command and environment."""
    became = []

    def take(file, command, environment):
        became.append((command, environment))
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
    command, environment = served(
        become, here / "model", "--card", "dam", "--port", 8123, "--", "--max-model-len", 99
    )
    assert command[1:4] == ["-m", "vllm.entrypoints.cli.main", "serve"]
    assert command[4] == str(here / "model")
    assert command[-4:] == ["--port", "8123", "--max-model-len", "99"]
    assert environment["DYNMASK_POLICY"] == f"dam:{(here / 'dam').resolve()}"
    said = capsys.readouterr().err
    assert said.strip().endswith(shlex.join(command)) and "DYNMASK_POLICY=dam:" in said


def test_a_card_in_the_environment_does_not_come_between(here, become, monkeypatch):
    monkeypatch.setenv("DYNMASK_CARD", "/another")
    _, environment = served(become, here / "model", "--policy", "streaming")
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


@pytest.mark.parametrize("given, dense", [([], 8192), (["--dense-up-to", 99], 99), (
    ["--dense-up-to", 0], 0)])  # fmt: skip
def test_short_prompts_of_gated_cards_are_read_whole(here, become, monkeypatch, given, dense):
    """The policy's text form carries it, so that transformers can be asked the same."""
    monkeypatch.setattr("dynmask.integrations.vllm.settings.policy_of_card", lambda p: f"gated:{p}")
    monkeypatch.setattr(serve, "_check", lambda *a: None)
    monkeypatch.setattr(serve, "command_of", lambda *a, **k: ["it"])
    _, environment = served(become, here / "model", "--card", "owner/name", *given)
    expected = "gated:owner/name" + (f",dense_up_to={dense}" if dense else "")
    assert environment["DYNMASK_POLICY"] == expected


def test_the_backend_is_named_where_there_is_a_gpu(here, become, monkeypatch):
    monkeypatch.setattr(serve, "_has_gpu", lambda: True)
    command, _ = served(become, here / "model", "--policy", "streaming")
    assert command[5:7] == ["--attention-backend", "CUSTOM"]
    monkeypatch.setattr(serve, "_has_gpu", lambda: False)
    assert "CUSTOM" not in served(become, here / "model", "--policy", "streaming")[0]


def test_nothing_runs_when_it_is_only_to_be_printed(here, capsys, monkeypatch):
    monkeypatch.setattr(os, "execvpe", None)
    own = "serve", str(here / "model"), "--policy", "streaming", "--print-only"
    assert cli.main(list(own)) == 0
    assert "vllm.entrypoints.cli.main serve" in capsys.readouterr().out


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
        (["--policy", "gated:decode=keep"], "'select' under vLLM"),
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
    command, environment = served(become, tmp_path / "converted", "--policy", "dma", "--", "--x")
    assert command[-3:] == ["--load-format", "dynmask", "--x"]
    assert environment["DYNMASK_POLICY"] == "dma"


def test_other_commands_pass_nothing_on():
    with pytest.raises(SystemExit) as stop:
        cli.main(["inspect", "card", "--", "--port", "1"])
    assert stop.value.code == 2
