"""Hostile cards and checkpoints are refused by every command before a model is opened."""

import json
import pickle

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from safetensors.torch import save

import dynmask
from dynmask import Budget, DamSettings, GatedSettings, cli
from dynmask.card import FILE_NAME
from tests.stand_in import save_stand_in
from tests.test_retained import SETTINGS, train
from tests.tiny import tiny_llama

GATED = GatedSettings(max_kl=100.0, budgets=(Budget(5, 4),), judged=4, sinks=1)
DOCUMENTS = [torch.arange(3, 70), torch.arange(20, 87)]


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    """One of each kind, as bytes."""
    folder, model = tmp_path_factory.mktemp("cards"), tiny_llama()
    made = {
        "dam": dynmask.calibrate(model, DOCUMENTS, settings=DamSettings(length=64), progress=False),
        "retained": train(model),
        "gated": dynmask.calibrate(
            model, DOCUMENTS, policy="gated", settings=GATED, progress=False
        ),
    }
    return {kind: card.save_pretrained(folder / kind).read_bytes() for kind, card in made.items()}


class Executed:
    """A pickle that does something when it is read."""

    def __reduce__(self):
        return pytest.fail, ("a card was executed",)


def flipped(content):
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


def of_a_million_heads(content):
    size = 8 + int.from_bytes(content[:8], "little")
    table = json.loads(content[8:size])
    header = json.loads(table["__metadata__"]["dynmask"])
    header["model"]["heads"] = 10**6
    table["__metadata__"]["dynmask"] = json.dumps(header)
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + content[size:]


HARM = {
    "cut": lambda content: content[: len(content) // 2],
    "one bit": flipped,
    "empty": lambda content: b"",
    "a table without end": lambda content: b"\xff" * 8 + content[8:],
    "a million heads": of_a_million_heads,
    "a pickle": lambda content: pickle.dumps(Executed()),
    "weights": lambda content: save({"w": torch.ones(3)}),
}
COMMANDS = {
    "generate": ["--prompt", "a b c"],
    "inspect": ["--prompt", "a b c"],
    "evaluate": ["--task", "needle"],
}


@pytest.fixture
def unopened(monkeypatch):
    """A model that must not be opened, under a name that the hub would be asked for."""
    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        kind = getattr(transformers, name)
        monkeypatch.setattr(kind, "from_pretrained", lambda *_, **__: pytest.fail("opened a model"))
    return "nobody/no-such-model"


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("kind", ["dam", "retained", "gated"])
def test_a_hostile_card_is_refused_by_every_command(kind, harm, cards, unopened, tmp_path, capsys):
    (tmp_path / FILE_NAME).write_bytes(HARM[harm](cards[kind]))
    calls = [
        [name, "--model", unopened, "--policy", f"{kind}:{tmp_path}", *more]
        for name, more in COMMANDS.items()
    ]
    for call in (*calls, ["inspect", str(tmp_path)]):
        assert cli.main(call) == 2
        message = capsys.readouterr().err
        assert "mask card: expected" in message and "received" in message, message
        assert "--model" not in message and "Traceback" not in message


@pytest.mark.parametrize("command", COMMANDS)
def test_cards_that_are_no_use_are_refused_as_early(command, cards, unopened, tmp_path, capsys):
    """One of another policy, options that do not fit, a folder without any."""
    (tmp_path / FILE_NAME).write_bytes(cards["retained"])
    given = {
        f"gated:{tmp_path}": "a card of that policy",
        f"retained:{tmp_path},width=x": "width as int",
        f"retained:{tmp_path},width=1": "width",
        f"retained:{tmp_path / 'none'}": "does not exist",
    }
    for policy, expected in given.items():
        asked = [command, "--model", unopened, "--policy", policy, *COMMANDS[command]]
        assert cli.main(asked) == 2
        assert expected in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["dam", "retained", "gated"])
def test_a_card_of_a_model_of_another_shape_is_refused_before_the_weights(
    kind, command, cards, tmp_path, capsys, monkeypatch
):
    (tmp_path / FILE_NAME).write_bytes(cards[kind])
    model = save_stand_in(tmp_path / "model")
    config = transformers.AutoConfig.from_pretrained(model)
    config.num_hidden_layers = 5
    config.save_pretrained(model)
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("read")
    )
    asked = [command, "--model", str(model), "--policy", f"{kind}:{tmp_path}", *COMMANDS[command]]
    assert cli.main(asked) == 2
    message = capsys.readouterr().err
    assert "(layers 2)" in message and "a model with layers 5" in message


JOURNAL = json.dumps({"dynmask_budgets": 2, "identity": {}, "known": {}, "above": {}}).encode()
STATE = {"identity": {}, "step": 1}
FILES = {
    "retained": [("", save({"w": torch.ones(3)}, {"dynmask_retrofit": json.dumps(STATE)}))],
    "gated": [
        ("", JOURNAL),
        (".encoder", save({"w": torch.ones(3)}, {"dynmask_encoder": json.dumps(STATE)})),
    ],
}


@pytest.mark.parametrize("policy", FILES)
def test_a_hostile_checkpoint_is_refused_before_the_model_loads(policy, unopened, tmp_path, capsys):
    files = {tmp_path / f"run{end}": content for end, content in FILES[policy]}
    asked = ["calibrate", "--model", unopened, "--policy", policy, "--out", str(tmp_path / "out")]
    asked += ["--checkpoint", str(tmp_path / "run")]
    for path, content in files.items():
        path.write_bytes(content)
    with pytest.raises(pytest.fail.Exception, match="opened a model"):
        cli.main(asked)  # with files that can be read the next thing is the model
    for harmed, content in files.items():
        for harm in ("cut", "empty", "a table without end", "a pickle", "weights"):
            harmed.write_bytes(HARM[harm](content))
            assert cli.main(asked) == 2
            message = capsys.readouterr().err
            assert "checkpoint: expected a file that" in message and str(harmed) in message, harm
        harmed.write_bytes(content)


def test_a_checkpoint_of_another_kind_says_so_in_python_too(tmp_path):
    (tmp_path / "run").write_bytes(JOURNAL)
    with pytest.raises(ValueError, match="a run with these settings left.*cannot be read"):
        train(tiny_llama(), SETTINGS, checkpoint=tmp_path / "run")
