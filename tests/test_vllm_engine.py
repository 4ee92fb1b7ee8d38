"""vLLM's engine with the plugin: greedy tokens are those of transformers under the same policy.

Runs where vLLM is installed (``CONTRIBUTING.md``); each engine is a process of its own.
"""

import json
import os
import signal
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

import dynmask
from dynmask import MaskCard, policies
from dynmask.calibrate import DamSettings
from dynmask.nn import Retention
from tests.tiny import tiny_gemma3, tiny_gpt_oss, tiny_llama, tiny_mistral
from tests.vllm_run import ROOT, Server, ask

pytest.importorskip("vllm", reason="vLLM is not installed; see CONTRIBUTING.md")
pytestmark = pytest.mark.slow

TOKENS = 8
LENGTHS = (5, 37, 300, 1000, 2990)
CHUNKED = {"max_model_len": 3072, "max_num_batched_tokens": 256, "enable_prefix_caching": True}
WHOLE = {
    "max_model_len": 3072,
    "max_num_batched_tokens": 3072,
    "enable_chunked_prefill": False,
    "enable_prefix_caching": False,
}
GATED_CARD = ROOT / "models" / "dynmask-reference-gated"
RETAINED_CARD = ROOT / "models" / "dynmask-reference-retained"


def prompts_of(vocabulary, lengths=LENGTHS, seed=1):
    """Random prompts, and one that begins as the longest does."""
    draw = torch.Generator().manual_seed(seed)
    made = [torch.randint(3, vocabulary, (n,), generator=draw).tolist() for n in lengths]
    return [*made, made[-1][: lengths[-1] * 5 // 6] + made[0]]


@torch.inference_mode()
def answers(model, policy, prompts, tokens=TOKENS, chunk=0):
    """Greedy tokens of each prompt alone, by transformers."""
    found = []
    with dynmask.sparsify(model, policy):
        for prompt in prompts:
            ids = torch.tensor([prompt])
            cache = transformers.DynamicCache(config=model.config)
            if chunk:
                for part in ids[:, :-1].split(chunk, 1):
                    if part.shape[1] == chunk:
                        model(input_ids=part, past_key_values=cache)
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), past_key_values=cache,
                max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
            found.append(out[0, len(prompt) :].tolist())
    return found


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny Llama, its folder, and its DAM card."""
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny_llama(max_position_embeddings=4096, hidden_size=128, head_dim=32)
    model.save_pretrained(folder / "model")
    documents = list(torch.randint(3, 256, (6, 64), generator=torch.Generator().manual_seed(0)))
    settings = DamSettings(length=64, tau=0.1, mu=0.3)
    card = dynmask.calibrate(model, documents, settings=settings, progress=False)
    card.save_pretrained(folder / "dam")
    return model, folder


@pytest.mark.parametrize(
    "policy, cut",
    [
        ("streaming:sinks=4,window=64", CHUNKED),
        ("dam", CHUNKED),
        ("elastic", CHUNKED),
        ("gated:window=32,columns=16", WHOLE),
        ("gated:window=32,columns=16,decode=select", WHOLE),
        ("gated:window=64,columns=0,blocks=2,block=16", WHOLE),
        ("gated:window=64,columns=0,blocks=2,block=16,decode=select", WHOLE),
    ],
)
def test_prompts_of_5_to_3000_tokens_in_one_batch(tiny, tmp_path, policy, cut):
    model, folder = tiny
    prompts = prompts_of(256)
    own = {"DYNMASK_POLICY": policy}
    if policy == "dam":
        own = {"DYNMASK_CARD": str(folder / "dam")}
        policy = f"dam:{folder / 'dam'}"
    found = ask(tmp_path, folder / "model", prompts, TOKENS, own, **cut)
    expected = answers(model, policies.parse(policy), prompts)
    assert found.tokens == expected
    if cut is CHUNKED:
        assert found.cached[-1] >= 2048, "the shared prefix was read twice"
    assert expected != answers(model, policies.Causal(), prompts), "the mask changes nothing"


def asked_for(card, given):
    """Settings of a card as it is, or of its policy with other options."""
    if not given:
        return {"DYNMASK_CARD": str(card)}
    options = ",".join(f"{name}={value}" for name, value in given.items())
    return {"DYNMASK_POLICY": f"{MaskCard.from_pretrained(card).header['policy']}:{card},{options}"}


@pytest.mark.parametrize(
    "card, given, cut",
    [
        (GATED_CARD, {}, WHOLE),
        (GATED_CARD, {"decode": "select"}, WHOLE),
        (RETAINED_CARD, {}, CHUNKED),
    ],
)
def test_shipped_cards_on_the_reference_model(tmp_path, card, given, cut):
    header = MaskCard.from_pretrained(card).header
    name = json.loads((ROOT / "models/dynmask-reference/config.json").read_text())["vocab_size"]
    folder = _model_of(header["model"]["fingerprint"])
    prompts, tokens = prompts_of(name, (5, 37, 300, 1500, 2990)), 3 * TOKENS
    found = ask(tmp_path, folder, prompts, tokens, asked_for(card, given), **cut)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    policy = MaskCard.from_pretrained(card).policy
    assert found.tokens == answers(model, policy(**given), prompts, tokens)
    if given:
        assert found.tokens != answers(model, policy(), prompts, tokens), "nothing is chosen"
    assert "depend on where vLLM cuts" not in found.said


def _model_of(fingerprint):
    from dynmask.integrations.checkpoint import fingerprint_of_files

    folders = [Path(p).parent for p in (ROOT / "models").glob("*/config.json")]
    return next(f for f in folders if fingerprint_of_files(f) == fingerprint)


def test_a_choice_by_chunks_is_that_of_transformers_in_the_same_chunks(tiny, tmp_path):
    model, folder = tiny
    prompt = prompts_of(256, (1000,))[:1]
    policy = "gated:window=32,columns=16"
    found = ask(tmp_path, folder / "model", prompt, TOKENS, {"DYNMASK_POLICY": policy}, **CHUNKED)
    assert "depend on where vLLM cuts a prompt" in found.said
    assert found.tokens == answers(model, policies.parse(policy), prompt, chunk=256)


@pytest.mark.parametrize("make", [tiny_mistral, tiny_gemma3])
def test_sliding_windows_of_the_model_are_honoured(tmp_path, make):
    model = make(max_position_embeddings=1024, sliding_window=48)
    model.save_pretrained(tmp_path / "model")
    prompts = prompts_of(256, (5, 37, 300, 700))
    for policy, cut in (
        ("streaming:sinks=4,window=100", CHUNKED),
        ("gated:window=16,columns=8", WHOLE),
        ("gated:window=16,columns=8,decode=select", WHOLE),
    ):
        cut = cut | {"max_model_len": 1024, "max_num_batched_tokens": 1024 if cut is WHOLE else 256}
        own = {"DYNMASK_POLICY": policy}
        found = ask(tmp_path, tmp_path / "model", prompts, TOKENS, own, **cut)
        assert found.tokens == answers(model, policies.parse(policy), prompts)
        if policy.startswith("gated"):
            assert found.tokens != answers(model, policies.Causal(), prompts), "nothing is chosen"


@pytest.mark.skipif(find_spec("vllm._C") is None, reason="experts need vLLM's compiled part")
def test_attention_sinks_of_the_model_are_honoured(tmp_path):
    """gpt-oss: sinks, a sliding layer and a full one, experts."""
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 150_000.0,
        "factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 256,
    }
    model = tiny_gpt_oss(sliding_window=48, rope_parameters=yarn)
    for layer in model.model.layers:
        torch.nn.init.normal_(
            layer.self_attn.sinks, 1.0, generator=torch.Generator().manual_seed(0)
        )
    model.save_pretrained(tmp_path / "model")
    prompts = prompts_of(256, (5, 37, 300, 700))
    own = {"DYNMASK_POLICY": "streaming:sinks=4,window=100"}
    cut = CHUNKED | {"max_model_len": 1024}
    found = ask(tmp_path, tmp_path / "model", prompts, TOKENS, own, **cut)
    assert found.tokens == answers(model, policies.Streaming(4, 100), prompts)


@pytest.mark.parametrize(
    "card, given", [(GATED_CARD, {}), (GATED_CARD, {"decode": "select"}), (RETAINED_CARD, {})]
)
def test_tensor_parallel_ranks_share_a_card(tmp_path, card, given):
    folder = _model_of(MaskCard.from_pretrained(card).header["model"]["fingerprint"])
    prompts = prompts_of(250, (5, 300, 1000))
    found = ask(
        tmp_path, folder, prompts, TOKENS, asked_for(card, given), tensor_parallel_size=2,
        **WHOLE,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert found.tokens == answers(model, MaskCard.from_pretrained(card).policy(**given), prompts)


@pytest.mark.parametrize(
    "own, message",
    [
        ({"DYNMASK_CARD": str(GATED_CARD)}, "mask card: expected the model that it was calibrated"),
        ({"DYNMASK_CARD": "/nowhere"}, "expected"),
        ({"DYNMASK_POLICY": "gated:decode=keep"}, "decode: expected 'full' or 'select' under vLLM"),
    ],
)
def test_what_cannot_be_served_is_refused_before_the_first_token(tiny, tmp_path, own, message):
    _, folder = tiny
    found = ask(tmp_path, folder / "model", [[5, 6]], 1, own, check=False, **WHOLE)
    assert not found.tokens
    assert message in " ".join(found.said.split())


@pytest.mark.parametrize(
    "policy, cut",
    [
        ("streaming:sinks=4,window=400", CHUNKED),
        ("gated:window=32,columns=16,dense_up_to=400", WHOLE),
        ("gated:window=32,columns=16,dense_up_to=400,decode=select", WHOLE),
    ],
)
def test_the_backend_of_gpus_leaves_what_is_read_whole_to_flash_attention(
    tiny, tmp_path, policy, cut
):
    """vLLM's FlashAttention backend with its functions in tensor operations."""
    model, folder = tiny
    prompts = prompts_of(256)
    own = {"DYNMASK_POLICY": policy, "DYNMASK_TEST_FLASH": "1"}
    found = ask(tmp_path, folder / "model", prompts, TOKENS, own, **cut)
    assert found.tokens == answers(model, policies.parse(policy), prompts)
    assert "'chosen'" in found.said
    short = ask(tmp_path, folder / "model", prompts[:3], TOKENS, own, **cut)
    assert short.tokens == found.tokens[:3]
    assert "'dense'" in short.said and "'chosen'" not in short.said


class PromptsAlone(policies.Gated):
    """Chooses for prompts; decoded tokens read every key, whatever ``decode`` says."""

    phase = "prefill"


@pytest.mark.parametrize(
    "decode, phase",
    [
        ("select", {"DYNMASK_PHASE": "prefill"}),
        ("full", {}),
    ],
)
def test_a_policy_for_prompts_alone_leaves_decoding_to_flash_attention(
    tiny, tmp_path, decode, phase
):
    """By the setting, against what the policy says, and by the policy."""
    model, folder = tiny
    prompts = prompts_of(256)
    own = {"DYNMASK_POLICY": f"gated:window=32,columns=16,decode={decode}"}
    own |= {"DYNMASK_TEST_FLASH": "1"} | phase
    found = ask(tmp_path, folder / "model", prompts, TOKENS, own, **WHOLE)
    chooses = {"window": 32, "columns": 16, "decode": "select"}
    expected = answers(model, PromptsAlone(**chooses), prompts)
    assert found.tokens == expected
    assert expected != answers(model, policies.Gated(**chooses), prompts)
    assert "'dense'" in found.said and "'chosen'" in found.said


def test_graphs_hold_attention_that_reads_every_key_and_no_other(monkeypatch):
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

    from dynmask.integrations.vllm import flash

    for whole, support in ((True, "UNIFORM_SINGLE_TOKEN_DECODE"), (False, "NEVER")):
        engine = SimpleNamespace(decodes_whole=whole)
        monkeypatch.setattr(flash.Engine, "of", lambda config, engine=engine: engine)
        found = flash.FlashBuilder.get_cudagraph_support(None, None)
        assert found is AttentionCGSupport[support]
    builder = object.__new__(flash.FlashBuilder)
    monkeypatch.setattr(builder, "build", lambda **_: SimpleNamespace(dynmask="a batch"))
    recorded = builder.build_for_cudagraph_capture(None)
    impl = object.__new__(flash.FlashImpl)
    impl._parts = SimpleNamespace(layer=lambda name: None)  # a layer that nobody may ask
    monkeypatch.setattr(FlashAttentionImpl, "forward", lambda *step: "flash attention")
    layer = SimpleNamespace(layer_name="model.layers.0.self_attn.attn")
    assert impl.forward(layer, None, None, None, None, recorded, None) == "flash attention"


def test_lengths_come_from_the_host_where_it_knows_them():
    from dynmask.integrations.vllm.backend import batch_of

    starts, lengths = torch.tensor([0, 3, 4]), torch.tensor([3, 9])
    common = SimpleNamespace(query_start_loc_cpu=starts, block_table_tensor=None, seq_lens=None)
    common.seq_lens_cpu_upper_bound = lengths
    assert batch_of(common).lengths == [3, 9]
    common.seq_lens, common.seq_lens_cpu_upper_bound = lengths, None
    assert batch_of(common).lengths == [3, 9]


def test_a_converted_model_reads_by_its_own_scores(tmp_path):
    model = dynmask.convert(tiny_llama(max_position_embeddings=1024), width=40, window=16, sinks=2)
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            score, g = layer.self_attn.dynmask_score, torch.Generator().manual_seed(number)
            score.dt_proj.weight.normal_(std=0.5, generator=g)
            score.A.fill_(0.5)
    layer.self_attn.dynmask_score.retention = Retention((30, 50), 16, 2)
    model.save_pretrained(tmp_path / "model")
    prompts = prompts_of(256, (5, 37, 300, 700))
    own = CHUNKED | {"max_model_len": 1024, "load_format": "dynmask"}
    found = ask(tmp_path, tmp_path / "model", prompts, TOKENS, {"DYNMASK_POLICY": "dma"}, **own)
    model = dynmask.load_converted(tmp_path / "model")
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        expected.append(out[0, len(prompt) :].tolist())
    assert found.tokens == expected


CHAT = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


@torch.inference_mode()
def test_the_server_answers_completions_and_chat(tmp_path):
    """Started by ``dynmask serve`` with the shipped card, asked over HTTP, stopped."""
    folder = _model_of(MaskCard.from_pretrained(GATED_CARD).header["model"]["fingerprint"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "The first line says red. The second line says blue. " * 8 + "The first line says"
    (tmp_path / "chat.jinja").write_text(CHAT)
    passed_on = ["--max-model-len", "2048", "--chat-template", str(tmp_path / "chat.jinja")]
    card = ["--card", str(GATED_CARD), "--dense-up-to", "64"]
    greedy = {"model": str(folder), "temperature": 0, "max_tokens": TOKENS}
    with Server(tmp_path, folder, card, passed_on) as server:
        status, found = server.ask("/v1/completions", prompt=text, **greedy)
        assert status == 200
        asked = [{"role": "user", "content": text}]
        status, chat = server.ask("/v1/chat/completions", messages=asked, **greedy)
        assert status == 200 and chat["choices"][0]["message"]["content"]
        # what cannot be answered is the asker's fault, and the next one is answered
        long = "word " * 4000
        for wrong in ({"prompt": long}, {"prompt": [10**7]}, {"prompt": text, "max_tokens": -1}):
            status, _ = server.ask("/v1/completions", **greedy | wrong)
            assert 400 <= status < 500
        for _ in range(2):
            endless = greedy | {"max_tokens": 1500, "ignore_eos": True}
            server.hang_up("/v1/completions", prompt=text, **endless)
        again = server.ask("/v1/completions", prompt=text, **greedy)[1]
    assert server.process.returncode in (0, -2, 130)
    assert any("DYNMASK_POLICY=gated:" in line for line in server.said)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > 64
    policy = MaskCard.from_pretrained(GATED_CARD).policy(dense_up_to=64)
    expected = tokenizer.decode(answers(model, policy, [ids])[0])
    for answer in (found, again):
        assert answer["choices"][0]["text"] == expected


def test_a_killed_worker_is_reported_and_the_next_request_is_answered(tmp_path):
    """By a server that ``--restart`` starts again; the second such end is its own end."""
    folder = _model_of(MaskCard.from_pretrained(GATED_CARD).header["model"]["fingerprint"])
    greedy = {"model": str(folder), "prompt": "The first line says red. " * 9, "temperature": 0}
    endless = greedy | {"max_tokens": 2500, "ignore_eos": True}
    greedy |= {"max_tokens": TOKENS}
    own = ["--policy", "streaming:sinks=4,window=16", "--restart", "1"]
    with Server(tmp_path, folder, own, ["--max-model-len", "3072"]) as server:
        for again in (True, False):
            status, expected = server.ask("/v1/completions", **greedy)
            assert status == 200
            connection, under_way = server.begin("/v1/completions", **endless)
            victims = server.processes(b"Worker") or server.processes(b"EngineCore")
            os.kill(victims[0], signal.SIGKILL)
            assert b'"error"' in under_way.read()  # the last event of the stream
            connection.close()
            if again:
                server.wait_for_restart()
                status, found = server.ask("/v1/completions", **greedy)
                assert (status, found["choices"]) == (200, expected["choices"])
        assert server.process.wait(60) == 1
    said = "".join(server.said)
    assert "starting it again (1 of 1)" in said and "giving up" in said
