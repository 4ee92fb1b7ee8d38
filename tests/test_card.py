"""MaskCard: what is written is read back, and whatever else a file holds is a ValueError."""

import copy
import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DynamicCache

from dynmask import BoundedCache, GatedCache
from dynmask.card import FILE_NAME, MaskCard
from dynmask.card_kinds import pack_bits, unpack_bits, use_of
from dynmask.fingerprints import describe_model, fingerprint
from tests.tiny import tiny_llama, tiny_qwen3

LAYERS, HEADS, LENGTH = 2, 4, 12


def make_header() -> dict:
    figures = [[0.25] * HEADS for _ in range(LAYERS)]
    return {
        "schema": 1,
        "version": "0.1.0",
        "policy": "dam",
        "settings": {"length": LENGTH, "tau": 0.3},
        "model": {
            "fingerprint": "f" * 64,
            "architecture": "llama",
            "layers": LAYERS,
            "heads": HEADS,
            "kv_heads": 2,
            "head_dim": 16,
        },
        "data": {"sha256": "d" * 64, "documents": 3, "tokens": 3 * LENGTH, "seed": 0},
        **{k: figures for k in ("density", "kept_mass", "true_density", "true_kept_mass")},
    }


def make_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(LAYERS):
        true_mask = torch.rand(HEADS, LENGTH, LENGTH, generator=generator) < 0.4
        tensors[f"layers.{layer}.diagonals"] = torch.tensor(
            [[0, 1, 5], [0, -1, -1], [-1, -1, -1], [2, 11, -1]], dtype=torch.int32
        )
        tensors[f"layers.{layer}.verticals"] = torch.full((HEADS, 1), layer, dtype=torch.int32)
        tensors[f"layers.{layer}.true_mask"] = pack_bits(true_mask.tril())
    return tensors


def make_card() -> MaskCard:
    return MaskCard(make_header(), make_tensors())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return make_card().save_pretrained(tmp_path)


@pytest.fixture(scope="module")
def card_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_card().save_pretrained(tmp_path_factory.mktemp("card")).read_bytes()


def split(content: bytes) -> tuple[dict, bytes]:
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def join(table: dict, data: bytes) -> bytes:
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + data


def same(a: MaskCard, b: MaskCard) -> bool:
    return (
        a.header == b.header
        and a.tensors.keys() == b.tensors.keys()
        and all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
    )


# Round trip


def test_round_trip_from_folder_and_file(saved: Path):
    assert same(MaskCard.from_pretrained(saved), make_card())
    assert same(MaskCard.from_pretrained(str(saved.parent)), make_card())


def test_a_card_knows_the_name_of_where_it_was_loaded_from(saved: Path, monkeypatch):
    assert make_card().source is None
    name = saved.parent.name
    monkeypatch.chdir(saved.parent)
    for place in (saved, saved.parent, ".", saved.name, f"../{name}"):
        assert MaskCard.from_pretrained(place).source == name


def test_the_digest_is_of_names_and_numbers():
    def digest(**tensors):
        return MaskCard.digest.fget(SimpleNamespace(tensors=tensors))  # type: ignore[attr-defined]

    one, two = torch.arange(3.0), torch.arange(3.0) + 1
    assert digest(a=one, b=two) == digest(b=two.clone(), a=one)
    assert len({digest(a=one, b=two), digest(a=two, b=one), digest(a=one, c=two)}) == 3
    assert make_card().digest == digest(**make_tensors())


def test_same_card_gives_same_bytes(tmp_path: Path, card_bytes: bytes):
    assert make_card().save_pretrained(tmp_path).read_bytes() == card_bytes


def test_file_is_ordinary_safetensors(saved: Path):
    from safetensors.torch import load_file

    tensors = load_file(saved)
    assert all(torch.equal(tensors[name], t) for name, t in make_tensors().items())


def test_patterns_of_a_layer():
    card = make_card()
    diagonals, verticals, true_mask = card.patterns(1)
    assert diagonals.tolist()[3] == [2, 11, -1]
    assert verticals.unique().tolist() == [1]
    assert true_mask.shape == (HEADS, LENGTH, LENGTH) and true_mask.dtype == torch.bool
    assert torch.equal(pack_bits(true_mask), card.tensors["layers.1.true_mask"])
    with pytest.raises(ValueError, match=r"layer: expected 0 to 1, received 2"):
        card.patterns(2)


def test_bits_are_packed_lowest_first():
    assert pack_bits(torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 0, 1]).bool()).tolist() == [1, 2]


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_unpack_inverts_pack(bits: list[bool]):
    mask = torch.tensor(bits)
    assert torch.equal(unpack_bits(pack_bits(mask), len(bits)), mask)


def test_policy_applies_the_card():
    """Rows below L follow the true mask, later rows diagonals and verticals; self is visible."""
    from dynmask.policies import Layer

    card = make_card()
    n = LENGTH + 5
    mask = card.policy()(torch.zeros(1, HEADS, n, 16), *[torch.zeros(1, 2, n, 16)] * 2, Layer(1))
    dense = mask.dense()[0]
    self_ = torch.eye(LENGTH, dtype=torch.bool)
    assert torch.equal(dense[:, :LENGTH, :LENGTH], card.patterns(1)[2] | self_)
    assert dense[0, 14].nonzero().flatten().tolist() == [1, 9, 13, 14]  # 14 - {5, 1, 0}, column 1
    assert dense[2, 16].nonzero().flatten().tolist() == [1, 16]


def test_repr_and_readme_tell_what_it_is(saved: Path):
    assert repr(make_card()) == (
        "MaskCard(dam: llama, 2 layers x 4 heads, L 12, density 25.0%, kept mass 25.0%)"
    )
    readme = (saved.parent / "README.md").read_text()
    assert "# Mask card: dam for llama" in readme and "25.00%" in readme


MODELS = Path(__file__).resolve().parent.parent / "models"


@pytest.mark.parametrize("name", ["retained", "gated", "gated-scores"])
@torch.no_grad()
def test_the_code_in_a_cards_readme_runs_and_frees_what_the_card_drops(name: str):
    folder = MODELS / f"dynmask-reference-{name}"
    card = MaskCard.from_pretrained(folder)
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert code.endswith(f"{use_of(card.header)}\n")
    model = AutoModelForCausalLM.from_pretrained(MODELS / "dynmask-reference")
    ids = torch.randint(9, 4_000, (1, 1_400), generator=torch.Generator().manual_seed(0))
    result, caches = {"max_new_tokens": 2, "return_dict_in_generate": True}, []
    keep = model.generate
    model.generate = lambda **given: caches.append(keep(**given).past_key_values)  # type: ignore
    exec(code.replace("path/to/this/folder", str(folder)),
         {"model": model, "inputs": {"input_ids": ids, **result}})  # fmt: skip
    held = {"retained": BoundedCache, "gated-scores": GatedCache}.get(name, DynamicCache)
    assert type(caches[0]) is held
    if held is not DynamicCache:
        assert caches[0].nbytes < 0.9 * 8 * 2 * 2 * 64 * 4 * ids.shape[1]


# Writing


def test_a_readme_that_is_there_stays(tmp_path: Path):
    (tmp_path / "README.md").write_text("mine")
    make_card().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_interrupted_save_leaves_what_was_there(saved: Path, monkeypatch, step: str):
    before = saved.read_bytes()
    other = make_header() | {"version": "0.2.0"}

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        MaskCard(other, make_tensors()).save_pretrained(saved.parent)
    assert saved.read_bytes() == before
    assert sorted(p.name for p in saved.parent.iterdir()) == ["README.md", FILE_NAME]


# The wrong model


def test_fingerprint_ignores_dtype_and_nothing_else():
    model = tiny_llama()
    original = fingerprint(model)
    assert fingerprint(tiny_llama().bfloat16()) == original
    assert fingerprint(tiny_llama(seed=1)) != original
    assert fingerprint(tiny_llama(layers=3)) != original
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] += 1
    assert fingerprint(model) != original


def test_fingerprint_of_weights_that_are_not_floating():
    model = torch.nn.Module()
    model.config = tiny_llama().config
    model.codes = torch.nn.Parameter(torch.arange(100).to(torch.int8), requires_grad=False)
    original = fingerprint(model)
    model.codes.data[0] = 7
    assert fingerprint(model) != original


def test_fingerprint_needs_loaded_weights_and_a_config():
    with torch.device("meta"):
        model = tiny_llama()
    with pytest.raises(ValueError, match="meta device"):
        fingerprint(model)
    with pytest.raises(ValueError, match=r"expected a transformers model, received Linear"):
        fingerprint(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("other", "field"),
    [
        (lambda: tiny_llama(seed=1), "fingerprint"),
        (lambda: tiny_llama(layers=3), "layers"),
        (lambda: tiny_llama(num_key_value_heads=4), "kv_heads"),
        (lambda: tiny_llama(head_dim=8), "head_dim"),
        (tiny_qwen3, "architecture"),
    ],
)
def test_check_names_what_differs(other, field: str):
    header = make_header() | {"model": describe_model(tiny_llama())}
    card = MaskCard(header, make_tensors())
    card.check(tiny_llama())
    card.check(tiny_llama().bfloat16())
    with pytest.raises(ValueError, match=rf"received a model with {field} .*calibrate this model"):
        card.check(other())


# A file that is not what it should be


@given(data=st.data())
def test_any_changed_byte_is_noticed(card_bytes: bytes, tmp_path_factory, data):
    """Only padding between JSON tokens may change, and then the card is the same."""
    position = data.draw(st.integers(0, len(card_bytes) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda v: v != card_bytes[position]))
    changed = bytearray(card_bytes)
    changed[position] = value
    path = tmp_path_factory.mktemp("changed") / FILE_NAME
    path.write_bytes(changed)
    try:
        card = MaskCard.from_pretrained(path)
    except ValueError:
        return
    assert chr(value).isspace()
    assert same(card, make_card())


@given(data=st.data())
def test_any_cut_or_tail_is_noticed(card_bytes: bytes, tmp_path_factory, data):
    length = data.draw(st.integers(0, len(card_bytes) - 1))
    path = tmp_path_factory.mktemp("cut") / FILE_NAME
    tail = card_bytes + bytes(length + 1)
    for content, message in ((card_bytes[:length], "card: expected"), (tail, "has a tail")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            MaskCard.from_pretrained(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(field=st.sampled_from(["dtype", "shape", "data_offsets"]), value=json_values)
def test_a_hostile_table_is_a_value_error(card_bytes: bytes, tmp_path_factory, field, value):
    table, data = split(card_bytes)
    if table["layers.0.true_mask"][field] == value:
        return
    table["layers.0.true_mask"][field] = value
    path = tmp_path_factory.mktemp("table") / FILE_NAME
    path.write_bytes(join(table, data))
    with pytest.raises(ValueError, match="mask card: expected"):
        MaskCard.from_pretrained(path)


def leaves(value, path=()):
    """Every place of a header, inner ones included."""
    yield path
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, (*path, name))


PLACES = [
    p for p in leaves(make_header()) if p and p not in [("settings", "tau"), ("data", "seed")]
]


@given(place=st.sampled_from(PLACES), value=json_values)
def test_a_hostile_header_is_a_value_error(place, value):
    """A header that fits its tensors is accepted, any other is a ValueError and nothing else."""
    header = copy.deepcopy(make_header())
    target = header
    for name in place[:-1]:
        target = target[name]
    target[place[-1]] = value
    try:
        MaskCard(header, make_tensors())
    except ValueError as error:
        assert "mask card: expected" in str(error)
    else:
        assert isinstance(value, str) or value >= 1


def retable(content: bytes, change) -> bytes:
    """The file with another table and header; `change(table, header)` edits them in place."""
    table, data = split(content)
    header = json.loads(table["__metadata__"]["dynmask"])
    change(table, header)
    if "__metadata__" in table:
        table["__metadata__"]["dynmask"] = json.dumps(header)
    return join(table, data)


def swap_offsets(table: dict, header: dict) -> None:
    a, b = table["layers.0.true_mask"], table["layers.1.true_mask"]
    a["data_offsets"] = b["data_offsets"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, h: h.update(schema=2), "expected schema 1, received schema 2.*dynmask that"),
        (lambda t, h: h.update(schema=True), "expected schema 1, received schema True"),
        (lambda t, h: h.update(policy="magic"), "among dam, retained, gated, received magic"),
        (lambda t, h: h.update(policy=["dam"]), "among dam, retained, gated, received"),
        (
            lambda t, h: t["layers.0.true_mask"].update(shape=[10**4000] * 3),
            "positive whole numbers",
        ),
        (lambda t, h: t["layers.0.true_mask"].update(shape=[1] * 99), "at most 8 positive"),
        (lambda t, h: h.update(density=[[0.5]]), "density as 2 x 4 numbers"),
        (lambda t, h: h["data"].update(documents=4), "match its own SHA-256"),
        (lambda t, h: h.pop("tensors_sha256"), "match its own SHA-256"),
        (lambda t, h: t.pop("__metadata__"), "header in the file's metadata.*not a model's"),
        (lambda t, h: t.pop("layers.1.verticals"), "without gap or overlap|bytes of data"),
        (swap_offsets, "without gap or overlap"),
        (lambda t, h: t["layers.0.true_mask"].update(shape=[1, 2]), "within the .* bytes"),
        (lambda t, h: t["layers.0.true_mask"].update(dtype="F64"), "a dtype among I32, U8"),
        (lambda t, h: h["model"].update(layers=3), "numbers from 0 to 1"),
        (lambda t, h: h["model"].update(kv_heads=3), "heads that are a multiple of kv_heads"),
        (lambda t, h: h["settings"].update(length=13), r"true_mask .*\[4, 13, 2\]"),
    ],
)
def test_edited_file(saved: Path, change, message: str):
    saved.write_bytes(retable(saved.read_bytes(), change))
    with pytest.raises(ValueError, match=message):
        MaskCard.from_pretrained(saved)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a file of 0 bytes"),
        (b"\xff" * 8 + b"{}", "a table of 2 to"),
        (b"\x04" + b"\0" * 7 + b"null", "a JSON object in its table"),
        (b"\x0d" + b"\0" * 7 + b'{"a":1,"a":2}', "a name that occurs twice"),
        (b"\x09" + b"\0" * 7 + b'{"a":NaN}', "the constant NaN"),
        (b"\x05" + b"\0" * 7 + b"\xff\xfe\xfd\xfc\xfb", "expected JSON in its table"),
        (b"\x50\xc3" + b"\0" * 6 + b"[" * 50_000, "expected JSON in its table"),
    ],
)
def test_no_safetensors_at_all(tmp_path: Path, content: bytes, message: str):
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        MaskCard.from_pretrained(tmp_path)


def test_a_pickle_is_not_executed(tmp_path: Path):
    marker = tmp_path / "executed"

    class Payload:
        def __reduce__(self):
            return Path.touch, (marker,)

    (tmp_path / FILE_NAME).write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match="mask card: expected"):
        MaskCard.from_pretrained(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("diagonals", [0, 1, LENGTH], r"in \[0, 12\), or -1 for padding, received -1 to 12"),
        ("diagonals", [0, 1, -2], r"in \[0, 12\)"),
        ("diagonals", [5, 1, -1], "sorted, without repeats, padding last"),
        ("verticals", [3, 3, -1], "sorted, without repeats"),
        ("verticals", [-1, 3, -1], "padding last"),
    ],
)
def test_offsets_out_of_range_or_order(name: str, row: list[int], message: str):
    tensors = make_tensors()
    rows = torch.full((HEADS, 3), -1, dtype=torch.int32)
    rows[2] = torch.tensor(row)
    tensors[f"layers.1.{name}"] = rows
    with pytest.raises(ValueError, match=message):
        MaskCard(make_header(), tensors)


def test_tensors_that_are_missing_unknown_or_of_another_dtype():
    tensors = make_tensors()
    lost = tensors.pop("layers.1.verticals")
    with pytest.raises(
        ValueError, match=r"the 6 tensors of 2 layers, received missing .*verticals"
    ):
        MaskCard(make_header(), tensors)
    with pytest.raises(ValueError, match=r"unknown \['layers\.2\.verticals'\]"):
        MaskCard(make_header(), make_tensors() | {"layers.2.verticals": lost})
    with pytest.raises(ValueError, match=r"verticals torch\.int32 .*received torch\.int64"):
        MaskCard(make_header(), tensors | {"layers.1.verticals": lost.long()})


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), True, "0.5"])
def test_shares_out_of_range(share):
    figures = [[0.5] * HEADS, [0.5, share, 0.5, 0.5]]
    with pytest.raises(ValueError, match="kept_mass as 2 x 4 numbers from 0 to 1"):
        MaskCard(make_header() | {"kept_mass": figures}, make_tensors())


def test_a_true_mask_that_looks_ahead():
    tensors = make_tensors()
    tensors["layers.0.true_mask"][1, 3, 0] |= 1 << 4
    with pytest.raises(ValueError, match=r"layers\.0\.true_mask with causal pairs only"):
        MaskCard(make_header(), tensors)


def test_a_folder_without_a_card(tmp_path: Path):
    with pytest.raises(ValueError, match="received a folder without it"):
        MaskCard.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "./no/such/card", "a/b/c"])
def test_a_path_that_does_not_exist(name: str):
    with pytest.raises(ValueError, match=r"owner/name.*does not exist here\. Check the path"):
        MaskCard.from_pretrained(name)


# The hub, without a network


def test_from_the_hub(saved: Path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(repo_id, filename, *, revision):
        asked.append((repo_id, filename, revision))
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    card = MaskCard.from_pretrained("someone/cards", revision="v1")
    assert same(card, make_card()) and card.source == "someone/cards"
    assert asked == [("someone/cards", FILE_NAME, "v1")]


def test_to_the_hub(monkeypatch):
    import huggingface_hub

    calls = []

    class Api:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, **kwargs):
            calls.append((repo_id, kwargs))

        def upload_folder(self, *, folder_path, **kwargs):
            files = sorted(p.name for p in Path(folder_path).iterdir())
            assert same(MaskCard.from_pretrained(folder_path), make_card())
            calls.append((files, kwargs))
            return "https://hub/commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    url = make_card().push_to_hub("someone/cards", private=True, token="t", revision="main")
    assert url == "https://hub/commit"
    assert calls == [
        ("token", "t"),
        ("someone/cards", {"private": True, "repo_type": "model", "exist_ok": True}),
        (
            ["README.md", FILE_NAME],
            {
                "repo_id": "someone/cards",
                "repo_type": "model",
                "revision": "main",
                "commit_message": "Upload a dynmask mask card",
            },
        ),
    ]
