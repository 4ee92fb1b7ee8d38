"""Long prompts: chunks are the whole, windows of text give its tokens, Ctrl-C and memory."""

import itertools
import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoTokenizer, DynamicCache, PreTrainedTokenizerFast

from dynmask import cli
from dynmask.evals.generation import attend, greedy
from dynmask.evals.text import haystack_lines
from dynmask.integrations import masking, placement, prefill, tokens
from dynmask.integrations.prefill import cache_for, chunk_note, default_chunk, read_chunks
from dynmask.integrations.tokens import stream_ids
from dynmask.policies import Causal, Gated, Streaming, VerticalSlash
from tests.stand_in import save_stand_in, stand_in_tokenizer
from tests.test_gallery import taught
from tests.tiny import TINY

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "recipes"))

import million  # noqa: E402

IDS = torch.randint(3, 250, (1, 203), generator=torch.Generator().manual_seed(3))


# --- chunks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 37, 202, 500])
@pytest.mark.parametrize(
    "make", [lambda _: Causal(), lambda _: Streaming(sinks=2, window=9), taught]
)
def test_chunks_are_the_whole_for_causal_policies(make, chunk):
    model = TINY["llama"]()
    policy = make(model)
    with attend(model, policy) as run:
        whole = greedy(model, IDS, 5, keep_logits=True)
        cache = cache_for(run, IDS.shape[1])
        parts = greedy(model, IDS, 5, keep_logits=True, cache=cache, chunk=chunk)
    assert parts.tokens == whole.tokens
    torch.testing.assert_close(parts.logits, whole.logits, rtol=1e-4, atol=1e-4)


def test_a_gated_cache_waits_for_the_end_of_the_prompt():
    model = TINY["llama"]()
    with attend(model, Gated(window=8, columns=4, last=4, decode="keep")) as run:
        cache = cache_for(run, IDS.shape[1])
        read = read_chunks(model, IDS, cache, 50)
        held = prefill.cache_bytes(cache)
        model(input_ids=IDS[:, read:], past_key_values=cache)
    assert read == 164 and (held or 0) > 3 * cache.nbytes


def test_generate_goes_on_after_the_chunks():
    model = TINY["llama"]()
    with attend(model, Streaming(sinks=2, window=9)) as run:
        want = model.generate(IDS, max_new_tokens=6, do_sample=False)
        cache, heard = cache_for(run, 203), []
        assert read_chunks(model, IDS, cache, 50, heard.append) == 164
        got = model.generate(IDS, max_new_tokens=6, do_sample=False, past_key_values=cache)
    assert heard == [41, 41, 41, 41] and got.tolist() == want.tolist()


def test_hybrid_models_go_on_after_the_chunks():
    # the state of linear attention is written in place by what follows, under no_grad alone
    import transformers

    config = transformers.Qwen3NextConfig(
        vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16,
        linear_value_head_dim=16, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen3NextForCausalLM(config).eval()
    with attend(model, Streaming(sinks=2, window=9)) as run:
        want = model.generate(IDS, max_new_tokens=6, do_sample=False)
        cache = cache_for(run, 203)
        read_chunks(model, IDS, cache, 50)
        got = model.generate(IDS, max_new_tokens=6, do_sample=False, past_key_values=cache)
    assert got.tolist() == want.tolist()


def test_no_mask_of_queries_times_keys_is_made(monkeypatch):
    sizes, real = [], placement.linear_mask
    monkeypatch.setattr(masking, "sdpa_mask", lambda **_: pytest.fail("a dense mask"))

    def seen(*args, **kwargs):
        sizes.append(real(*args, **kwargs))
        return sizes[-1]

    monkeypatch.setattr(placement, "linear_mask", seen)
    model = TINY["llama"]()
    for policy in (Causal(), VerticalSlash(verticals=9, slashes=9, last=5, window=4)):
        with attend(model, policy) as run:
            cache = cache_for(run, 203)
            assert isinstance(cache, DynamicCache)
            read_chunks(model, IDS, cache, 50)
            model.generate(
                IDS, attention_mask=torch.ones_like(IDS), past_key_values=cache, max_new_tokens=2
            )
    assert len(sizes) >= 10 and all(mask.numel() <= 4 * 205 for mask in sizes)


def test_what_chunks_mean_is_said():
    assert "change nothing" in chunk_note(Streaming(), 100, 30)
    assert "4 chunks" in chunk_note(None, 100, 30)
    anew = chunk_note(VerticalSlash(), 100, 30)
    assert "chooses anew" in anew and "change nothing" not in anew
    assert "after the last" in chunk_note(Gated(decode="keep"), 100, 30)
    narrow = {"columns": 0, "window": 5, "block": 10, "query_pool": 5, "key_pool": 5}
    guarded = Gated(**narrow, guard=0.1, promise=torch.ones(1, 1))
    assert "where the guard" in chunk_note(guarded, 100, 30)
    assert "where the guard" not in chunk_note(Gated(**narrow), 100, 30)


def test_short_prompts_and_the_models_own_attention_come_whole():
    assert default_chunk(None, 10**6) == 0
    assert default_chunk(Streaming(), 8192) == 0 and default_chunk(Streaming(), 8193) == 8192
    assert default_chunk(Gated(), 65536) == 0 and default_chunk(Gated(), 10**6) == 65536
    with pytest.raises(ValueError, match="chunk >= 1"):
        read_chunks(TINY["llama"](), IDS, None, 0)


# --- tokens ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(0)
    some = ["\n", " ", "   ", "a", "ß", "漢字", "12345", "😀", "<s>", "it's", "\r\n", "zz" * 20]
    return {
        "prose": "\n".join(haystack_lines()[:400]),
        "mixed": "".join(rng.choice(some) for _ in range(5000)),
        "one long word": "\n".join(haystack_lines()[:90]) + "ab" * 4000 + " " * 3000 + "end",
        "short": "hi",
        "empty": "",
    }


def whole_word_tokenizer():
    """As those of the first Llama: no pre-tokenizer, spaces are letters."""
    bpe = Tokenizer(models.BPE())
    space = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    bpe.normalizer = normalizers.Sequence(space)
    bpe.decoder = decoders.Replace("\u2581", " ")
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False)
    bpe.train_from_iterator(haystack_lines()[:50], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


@pytest.mark.parametrize("window", [(701, 200), (4000, 600), (2**18, 2**11)])
def test_windows_give_the_tokens_of_the_text(texts, window):
    reference = AutoTokenizer.from_pretrained(ROOT / "models" / "dynmask-reference")
    for tokenizer, (name, text) in itertools.product(
        (reference, stand_in_tokenizer()), texts.items()
    ):
        parts = [text[i : i + 777] for i in range(0, len(text), 777)]
        heard: list[int] = []
        got = stream_ids(tokenizer, parts, window=window[0], overlap=window[1], heard=heard.append)
        assert got[0].tolist() == tokenizer(text, verbose=False)["input_ids"], name
        if name == "prose" and window[0] < 5000:
            assert len(heard) > 3
    bare = stream_ids(reference, ["hi"], special=False)
    assert bare[0].tolist() == reference("hi", add_special_tokens=False)["input_ids"]


def test_windows_are_not_joined_within_a_word():
    text = "ab" * 1000
    tokenizer = stand_in_tokenizer()
    left, right = tokens._encode(tokenizer, [(0, text[:1200]), (800, text[800:])])
    assert tokens._border(left, right, words=True) is None
    i, j = tokens._border(left, right, words=False) or (0, 0)
    assert left.token(i) == right.token(j) and 800 < left.spans[i][0] < 1200


def test_windows_without_words_agree_on_tokens(texts):
    tokenizer = whole_word_tokenizer()
    got = stream_ids(tokenizer, [texts["prose"]], window=2000, overlap=700)
    assert got[0].tolist() == tokenizer(texts["prose"])["input_ids"]
    with pytest.raises(ValueError, match="overlap"):
        stream_ids(tokenizer, ["a"], window=10, overlap=5)


# --- the command -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    folder = tmp_path_factory.mktemp("million")
    (folder / "long.txt").write_text("once upon a time there was a mask. " * 20)
    model = str(save_stand_in(folder / "model"))
    start = ["generate", "--model", model, "--file", str(folder / "long.txt")]
    return [*start, "--max-new-tokens", "6"]


def test_the_command_reads_in_chunks_and_explains_the_memory(call, capsys):
    call = [*call, "--policy", "streaming:sinks=2,window=30"]
    assert cli.main([*call, "--chunk", "0", "--quiet"]) == 0
    whole, err = capsys.readouterr()
    assert "chunks of" not in err and "the whole prompt at once" in err
    assert cli.main([*call, "--chunk", "64"]) == 0
    out, err = capsys.readouterr()
    assert out == whole
    assert "under streaming each query reads what it would" in err and "token/s" in err
    assert cli.main([*call, "--chunk", "60"]) == 0
    err = capsys.readouterr().err
    (size,) = re.findall(r"chunks of up to (\d+) tokens", err)  # about equally long ones
    assert int(size) < 60 and f"one chunk of {size} tokens" in err
    assert cli.main([*call, "--chunk", "64", "--json", "--quiet"]) == 0
    data = json.loads(capsys.readouterr().out)
    memory = data["memory"]
    parts = ("weight_bytes", "cache_bytes", "rest_bytes")
    assert memory["peak_bytes"] == sum(memory[name] for name in parts)
    # 2 layers of 2 kv heads, keys and values of 16 floats: at most what is kept and one chunk
    one = 2 * 2 * 2 * 16 * 4
    assert 32 * one <= memory["cache_bytes"] < 128 * one < data["prompt_tokens"] * one
    assert not data["stopped"] and data["chunk"] == 64


def test_full_in_chunks_is_full(call, capsys):
    assert cli.main([*call, "--quiet"]) == 0
    whole = capsys.readouterr().out
    assert cli.main([*call, "--quiet", "--chunk", "100"]) == 0
    out, err = capsys.readouterr()
    assert out == whole and "under full each query reads what it would" in err


@pytest.mark.parametrize("after", [2, 9])
def test_ctrl_c_leaves_what_there_is(call, capsys, monkeypatch, after):
    """During the prompt nothing is printed but what happened; later the tokens so far."""
    from transformers import LlamaForCausalLM

    real, calls = LlamaForCausalLM.forward, []

    def impatient(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == after:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    more = ["--policy", "streaming", "--chunk", "64", "--quiet", "--json"]
    assert cli.main([*call, *more]) == 0
    whole = json.loads(capsys.readouterr().out)
    prompt = -(-whole["prompt_tokens"] // 64)
    monkeypatch.setattr(LlamaForCausalLM, "forward", impatient)
    assert cli.main([*call, *more]) == 130
    data = json.loads(capsys.readouterr().out)
    count = max(after - prompt, 0)
    assert data["stopped"] and data["new_tokens"] == count < whole["new_tokens"]
    assert whole["text"].startswith(data["text"])
    calls.clear()
    assert cli.main([*call, *more[:-1]]) == 130
    out, err = capsys.readouterr()
    assert out == (data["text"] + "\n" if count else "")
    assert "stopped" in err and "peak memory" in err and ("no token yet" in err) is (count == 0)


def test_a_file_is_refused_before_the_model_loads(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dynmask.cli.generate.load", lambda *_: pytest.fail("loaded a model"))
    late = tmp_path / "late.txt"
    late.write_bytes(b"a" * 300_000 + b"\xff")
    for path, message in ((late, "UTF-8"), (tmp_path / "none", "none")):
        assert cli.main(["generate", "--model", "m/m", "--file", str(path)]) == 2
        assert message in capsys.readouterr().err


# --- the recipe --------------------------------------------------------------------------------


def test_the_recipe_measures_one_case_at_a_time(tmp_path, capsys):
    for name in ("gated-512", "dma-256", "generate-512"):
        million.main(["--device", "cpu", "--smoke", "--out", str(tmp_path), "--only", name])
    assert million.cases()[0].name == "gated-1048576"
    rows = [json.loads(x) for x in (tmp_path / "million.jsonl").read_text().splitlines()]
    found = [(r["variant"], r["keys"]) for r in rows]
    assert found == [("gated", 512), ("dma", 256), ("generate", 512)]
    assert all(r["cache_bytes"] > 0 and r["versions"] and r["device"] for r in rows)
    with pytest.raises(SystemExit):
        million.main(["--only", "nothing"])


def test_the_headline_says_what_is_extrapolated(tmp_path):
    here = {"device": {"name": "x", "threads": 1}, "versions": {}, "commit": "c", "date": "d"}
    held = {"weight_bytes": 1, "peak_beyond_weights_bytes": 2, "cache_bytes": 3, "policy": "p"}
    times = {("dense", 131072): 2.0, ("dense", 262144): 6.0, ("dense", 65536): 1.0,
             ("gated", million.MILLION): 9.0, ("dma", million.MILLION): 3.0,
             ("dma", million.QUARTER): 1.0}  # fmt: skip
    rows = [{"variant": v, "keys": k, "median_s": s, **held, **here} for (v, k), s in times.items()]
    made = {r["goal"]: r for r in million.goals(rows, torch.device("cpu"), tmp_path)}
    speed = next(r for goal, r in made.items() if "gated against SDPA" in goal)
    assert speed["issue"] == 5 and speed["value"] == pytest.approx(6.0) and speed["met"]
    assert "extrapolated" in speed["note"] and "1.58" in speed["note"]
    dma = next(r for goal, r in made.items() if "dma against SDPA" in goal)
    assert dma["target"] == 12 and dma["value"] == pytest.approx(18.0)
    assert any("cache" in goal for goal in made) and len(made) == 4
    assert million.dense_law(rows[:1]) is None
