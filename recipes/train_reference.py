"""Train the reference model: 7.3M parameters that really retrieve over 32,768 tokens.

One NVIDIA H200 trains it from scratch in about a quarter of an hour::

    python recipes/train_reference.py --minutes 14.5 --out models/dynmask-reference

A small Llama is trained on permissive text that the machine carries and on generated questions
(``reference_data.py``), with sequences that grow from 512 to 32,768 tokens. Interrupt it at any
time: it resumes with ``--resume`` from its last checkpoint. ``--start MODEL`` runs a short second
phase on a trained model, with more hidden facts, and ``--average`` mixes the two. ``--smoke`` does
everything in a minute on a CPU, at toy sizes. ``--longeval DIR`` evaluates on official LongEval
files at the end; they are never trained on.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from reference_data import BOS, CLASS_WEIGHTS, EOS, PAD, Author, Batches, Corpus, build_corpus
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from dynmask.evals.lines import Lines
from dynmask.evals.longeval import LongEval
from dynmask.evals.needle import Needle
from dynmask.evals.task import Item, Task


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is trained.

    ``stages`` are (sequence length, share of the time). Lengths are a little above the nominal
    ones, so that a prompt of 32,768 tokens and its answer stay within what was trained. Every
    length divides ``tokens``, the size of a step. ``own`` is the share of documents with facts that
    are worded as the tasks of this project (half as many of those with records); words stay apart.
    """

    seed: int = 1
    minutes: float = 14.5
    tokens: int = 132_096
    stages: tuple[tuple[int, float], ...] = (
        (516, 0.22), (2_064, 0.15), (4_128, 0.10), (8_256, 0.13), (16_512, 0.15), (33_024, 0.25),
    )  # fmt: skip
    shorter: float = 0.2
    facts: float = 0.25
    own: float = 0.0
    learning_rate: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.1
    clip: float = 1.0
    warmup_steps: int = 200
    decay_from: float = 0.6
    hidden: int = 256
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 768
    vocabulary: int = 4_096
    rope_theta: float = 1_200_000.0
    characters: int = 80_000_000
    characters_per_source: int = 6_000_000
    workers: int = field(default_factory=lambda: max(1, min(14, (os.cpu_count() or 2) - 1)))
    checkpoint_minutes: float = 2.0
    evaluation_items: int = 50
    evaluation_lengths: tuple[int, ...] = (4_096, 8_192, 16_384, 32_768)

    def __post_init__(self) -> None:
        odd = [length for length, _ in self.stages if self.tokens % length]
        if odd:
            raise ValueError(
                f"stages: expected lengths that divide the {self.tokens} tokens of a step, "
                f"received {odd}; change tokens or the lengths"
            )
        if not math.isclose(sum(share for _, share in self.stages), 1.0):
            raise ValueError(
                f"stages: expected shares of the time that add up to 1, received {self.stages}; "
                "scale them"
            )
        if self.minutes <= 0:
            raise ValueError(f"minutes: expected more than 0, received {self.minutes}; pass 14.5")

    @property
    def longest(self) -> int:
        """The longest sequence in training."""
        return max(length for length, _ in self.stages)

    def length(self, step: int, progress: float) -> int:
        """Return the sequence length of a step: its stage's, or now and then a shorter one."""
        stage, passed = 0, self.stages[0][1]
        while progress >= passed and stage < len(self.stages) - 1:
            stage += 1
            passed += self.stages[stage][1]
        rng = random.Random(f"length/{self.seed}/{step}")
        if stage and rng.random() < self.shorter:
            stage = rng.randrange(stage)
        return self.stages[stage][0]

    def rate(self, step: int, progress: float) -> float:
        """Return the learning rate: warm-up in steps, then constant, then linear to zero."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        decay = min(1.0, (1.0 - progress) / (1.0 - self.decay_from))
        return self.learning_rate * warm * max(decay, 0.01)


def smoke(recipe: Recipe) -> Recipe:
    """Return the recipe at toy sizes: it must run through, not learn."""
    return replace(
        recipe, tokens=2_064, stages=((129, 0.5), (516, 0.5)), hidden=64, layers=2, heads=2,
        kv_heads=1, head_dim=32, intermediate=128, vocabulary=1_024, warmup_steps=5, workers=1,
        characters=1_500_000, characters_per_source=500_000, checkpoint_minutes=0.1,
        evaluation_items=3, evaluation_lengths=(512,),
    )  # fmt: skip


def polish(recipe: Recipe) -> Recipe:
    """Return the recipe of a short second phase that starts from a trained model."""
    return replace(
        recipe, minutes=1.7, seed=recipe.seed + 1, facts=0.3, own=0.5, learning_rate=4e-4,
        warmup_steps=50, decay_from=0.1, characters=36_000_000, shorter=0.3,
        stages=((516, 0.08), (2_064, 0.07), (4_128, 0.1), (16_512, 0.25), (33_024, 0.5)),
    )  # fmt: skip


# ------------------------------------------------------------------------------------- the model


def new_model(recipe: Recipe) -> LlamaForCausalLM:
    """Return a Llama with fan-in initialisation, which a width of 256 needs to learn to look up."""
    config = LlamaConfig(
        vocab_size=recipe.vocabulary, hidden_size=recipe.hidden, num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads, num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim, intermediate_size=recipe.intermediate, rms_norm_eps=1e-6,
        max_position_embeddings=recipe.longest, tie_word_embeddings=True,
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
    )  # fmt: skip
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            torch.nn.init.ones_(weight)
            continue
        scale = weight.shape[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            scale /= math.sqrt(2 * recipe.layers)
        torch.nn.init.normal_(weight, std=scale)
    return model


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def _project(x: Tensor, weights: list[Tensor]) -> tuple[Tensor, ...]:
    joined = torch.cat(weights).to(x.dtype)
    return F.linear(x, joined).split([len(weight) for weight in weights], dim=-1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def before_attention(
    x: Tensor, norm: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated queries and keys, and values, each [token, head, dim], of x [token, width]."""
    dim = cos.shape[-1]
    parts = _project(_norm(x, norm).to(cos.dtype), [q, k, v])
    query, key, value = (part.unflatten(-1, (-1, dim)) for part in parts)
    return _rotate(query, cos, sin), _rotate(key, cos, sin), value


def after_attention(
    x: Tensor, mixed: Tensor, o: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """Return the residual stream [token, width] after the output projection and the MLP."""
    x = x + F.linear(mixed, o.to(mixed.dtype))
    opened, raised = _project(_norm(x, norm).to(mixed.dtype), [gate, up])
    return x + F.linear(F.silu(opened) * raised, down.to(mixed.dtype))


def losses(
    x: Tensor, norm: Tensor, embedding: Tensor, targets: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return each token's cross-entropy and whether its target is the likeliest token."""
    logits = F.linear(_norm(x, norm).to(dtype), embedding.to(dtype)).float()
    right = logits.argmax(-1) == targets
    return F.cross_entropy(logits, targets, reduction="none"), right


class Trainer:
    """The training forward pass of LlamaForCausalLM, written out.

    Everything but attention works on single tokens and every step has the same number of tokens,
    so it is compiled once for all sequence lengths; attention is one call without a mask.
    """

    class_weights: Sequence[float] = CLASS_WEIGHTS

    def __init__(self, model: LlamaForCausalLM, recipe: Recipe, compiled: bool) -> None:
        self.model, self.recipe = model, recipe
        self.device = model.device
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        wrap: Callable[..., Any] = torch.compile if compiled else lambda function: function
        self.before, self.after, self.losses = map(
            wrap, (before_attention, after_attention, losses)
        )
        self.weights = torch.tensor(self.class_weights, device=self.device)
        self.tables: dict[int, tuple[Tensor, Tensor]] = {}
        self.backends: dict[int, SDPBackend | None] = {}

    def positions(self, length: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [token, dim] for rows of ``length`` tokens."""
        if length not in self.tables:
            place = torch.arange(self.recipe.tokens, device=self.device) % length
            cos, sin = self.model.model.rotary_emb(
                torch.empty(0, dtype=self.dtype, device=self.device), place[None]
            )
            self.tables[length] = cos[0], sin[0]
        return self.tables[length]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, length: int) -> Tensor:
        """Return causal attention [token, width] within rows of ``length`` tokens."""
        q, k, v = (part.unflatten(0, (-1, length)).transpose(1, 2) for part in (query, key, value))
        backend = self.backends.get(length)
        if backend is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).reshape(len(query), -1)

    def choose_backends(self) -> dict[int, str]:
        """Time the attention kernels at every length and keep the faster one that is right."""
        recipe, names = self.recipe, {}
        for length, _ in recipe.stages if self.device.type == "cuda" else ():
            times: dict[SDPBackend, float] = {}
            expected: Tensor | None = None
            for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
                self.backends[length] = backend
                generator = torch.Generator(self.device).manual_seed(length)
                parts = [
                    torch.randn(
                        recipe.tokens, heads, recipe.head_dim, generator=generator,
                        device=self.device, dtype=self.dtype, requires_grad=True,
                    )
                    for heads in (recipe.heads, recipe.kv_heads, recipe.kv_heads)
                ]  # fmt: skip
                try:
                    for _ in range(2):
                        torch.cuda.synchronize()
                        started = time.perf_counter()
                        out = self.attend(*parts, length)
                        gradients = torch.autograd.grad(out.float().square().sum(), parts)
                        torch.cuda.synchronize()
                        times[backend] = time.perf_counter() - started
                except RuntimeError:
                    times.pop(backend, None)
                    continue
                found = torch.cat([part.flatten() for part in (out, *gradients)]).float().detach()
                if expected is None:
                    expected = found
                elif not (found - expected).norm() < 0.02 * expected.norm():
                    del times[backend]
            best = min(times, key=lambda backend: times[backend])
            self.backends[length] = best
            names[length] = f"{best.name.lower()} {1e3 * times[best]:.1f} ms"
        return names

    def loss(self, ids: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return (weighted mean loss, counts [class, (tokens, summed loss, right)]).

        ``ids`` and ``classes`` are [row, token]; class c of a token weighs its prediction.
        """
        length = ids.shape[1]
        cos, sin = self.positions(length)
        flat = ids.flatten()
        x = F.embedding(flat, self.model.model.embed_tokens.weight)
        for layer in self.model.model.layers:
            a, m = layer.self_attn, layer.mlp
            query, key, value = self.before(
                x, layer.input_layernorm.weight, a.q_proj.weight, a.k_proj.weight,
                a.v_proj.weight, cos, sin,
            )  # fmt: skip
            mixed = self.attend(query, key, value, length)
            x = self.after(
                x, mixed, a.o_proj.weight, layer.post_attention_layernorm.weight,
                m.gate_proj.weight, m.up_proj.weight, m.down_proj.weight,
            )  # fmt: skip
        targets = torch.roll(flat, -1)
        kinds = F.pad(classes[:, 1:], (0, 1)).flatten()
        each, right = self.losses(
            x, self.model.model.norm.weight, self.model.model.embed_tokens.weight, targets,
            self.dtype,
        )  # fmt: skip
        weights = self.weights[kinds]
        rows = torch.stack((torch.ones_like(each), each.detach(), right.float()), dim=1)
        counts = torch.zeros(len(self.weights), 3, device=x.device).index_add_(0, kinds, rows)
        return (each * weights).sum() / weights.sum(), counts

    @staticmethod
    def figures(length: int, table: Tensor) -> dict[str, float]:
        """Return what the log says about a length, from its counts as ``loss`` returns them."""
        amount, summed, right = table.T.tolist()
        return {
            f"answers_{length}": round(right[4] / max(amount[4], 1), 4),
            f"text_loss_{length}": round(summed[3] / max(amount[3], 1), 4),
        }


def new_optimizer(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """Return AdamW; norms do not decay."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    fused = model.device.type == "cuda"
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=fused)


# ------------------------------------------------------------------------------------ its memory


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make a file beside ``path``, then put it in place."""
    beside = path.with_name(path.name + ".new")
    write(beside)
    os.replace(beside, path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def save_checkpoint(
    path: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, state: dict[str, Any]
) -> None:
    """Write weights, both moments and the state into one safetensors file, atomically."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors["model." + name] = parameter.detach()
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    metadata = {"state": json.dumps(state)}
    write_atomically(path, lambda beside: save_file(tensors, str(beside), metadata))


def load_checkpoint(
    path: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW
) -> dict[str, Any]:
    """Load what ``save_checkpoint`` wrote into model and optimizer and return the state."""
    with safe_open(str(path), framework="pt", device=str(model.device)) as file:
        state = json.loads(file.metadata()["state"])
        for name, parameter in model.named_parameters():
            with torch.no_grad():
                parameter.copy_(file.get_tensor("model." + name))
            optimizer.state[parameter] = {
                # The fused implementation counts steps on the device.
                "step": torch.tensor(
                    float(state["step"]),
                    device=model.device if model.device.type == "cuda" else "cpu",
                ),
                "exp_avg": file.get_tensor(f"exp_avg.{name}"),
                "exp_avg_sq": file.get_tensor(f"exp_avg_sq.{name}"),
            }
    return state


def save_corpus(folder: Path, corpus: Corpus) -> None:
    """Keep the tokenised text and the tokenizer, so that a resumed run reads the same."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {"code": torch.from_numpy(corpus.code), "prose": torch.from_numpy(corpus.prose)}
    metadata = {"words": json.dumps(corpus.words), "sources": json.dumps(corpus.sources)}
    write_atomically(
        folder / "text.safetensors", lambda beside: save_file(arrays, str(beside), metadata)
    )
    corpus.tokenizer.save(str(folder / "tokenizer.json"))


def load_corpus(folder: Path) -> Corpus:
    """Load what ``save_corpus`` kept."""
    with safe_open(str(folder / "text.safetensors"), framework="np") as file:
        metadata = file.metadata()
        return Corpus(
            Tokenizer.from_file(str(folder / "tokenizer.json")),
            file.get_tensor("code"),
            file.get_tensor("prose"),
            json.loads(metadata["words"]),
            json.loads(metadata["sources"]),
        )


# ------------------------------------------------------------------------------------ the training


def train(
    recipe: Recipe,
    corpus: Corpus,
    batches: Batches,
    out: Path,
    device: str,
    options: Any,
    kind: type[Trainer] = Trainer,
    phase: int | None = None,
) -> LlamaForCausalLM:
    """Train, write ``training.jsonl`` and checkpoints, and return the model.

    ``phase`` is the number that the log gives this phase; by default 2 on a trained model, else 1.
    """
    model = new_model(recipe)
    if options.start:
        trained = AutoModelForCausalLM.from_pretrained(options.start, dtype=torch.float32)
        model.load_state_dict(trained.state_dict())
    model = model.to(device)
    optimizer = new_optimizer(model, recipe)
    trainer = kind(model, recipe, options.compile)
    checkpoint, log = out / "work" / "checkpoint.safetensors", out / "training.jsonl"
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "tokens": 0}
    if options.resume and checkpoint.is_file():
        state = load_checkpoint(checkpoint, model, optimizer)
        print(f"resumed at step {state['step']}, {state['seconds']:.0f} s")
    else:
        earlier_log = options.start / "training.jsonl" if options.start else None
        write_atomically(log, lambda new: new.write_text(
            earlier_log.read_text("utf-8") if earlier_log and earlier_log.is_file() else "",
            encoding="utf-8",
        ))  # fmt: skip
    kernels = trainer.choose_backends()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters; attention: {kernels}", flush=True)

    total = 60 * recipe.minutes
    earlier, started = state["seconds"], time.perf_counter()
    step, asked = state["step"], state["step"]
    saved = logged = earlier
    counts: dict[int, Tensor] = {}
    bar = tqdm(total=round(total), initial=round(earlier), unit="s", mininterval=5)
    finished = False
    try:
        while not finished:
            seconds = earlier + time.perf_counter() - started
            progress = min(1.0, seconds / total)
            while batches.free:
                batches.ask(asked, recipe.length(asked, progress))
                asked += 1
            ids, classes, length = batches.take(step)
            tokens = torch.from_numpy(ids.astype(np.int32)).to(device, non_blocking=True).long()
            kinds = torch.from_numpy(classes.astype(np.int32)).to(device, non_blocking=True)
            rate = recipe.rate(step, progress)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, found = trainer.loss(tokens, kinds)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            counts[length] = counts[length] + found if length in counts else found
            step += 1
            state["tokens"] += recipe.tokens
            if step % 10 and step > 20:
                continue
            value = loss.item()  # waits for the device, so that the clock is right
            seconds = earlier + time.perf_counter() - started
            if not math.isfinite(value):
                raise RuntimeError(f"the loss is {value} at step {step}; lower the learning rate")
            finished = seconds >= total or step >= options.steps
            if seconds - logged >= options.log_seconds or finished or step in (1, 2, 5, 10, 20):
                row = {
                    "phase": phase or (2 if options.start else 1), "step": step,
                    "seconds": round(seconds, 1), "tokens": state["tokens"],
                    "lr": round(rate, 6), "loss": round(value, 4),
                }  # fmt: skip
                for size, table in sorted(counts.items()):
                    row |= trainer.figures(size, table)
                with open(log, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                bar.set_postfix_str(
                    f"step {step} loss {value:.3f} answers "
                    + " ".join(f"{k[8:]}:{v:.1%}" for k, v in row.items() if k[:8] == "answers_")
                )
                bar.update(round(seconds) - bar.n)
                counts.clear()
                logged = seconds
            if seconds - saved >= 60 * recipe.checkpoint_minutes:
                save_checkpoint(checkpoint, model, optimizer, {**state, "step": step,
                                "seconds": seconds})  # fmt: skip
                saved = seconds
    except KeyboardInterrupt:
        seconds = earlier + time.perf_counter() - started
        save_checkpoint(checkpoint, model, optimizer, {**state, "step": step, "seconds": seconds})
        bar.close()
        sys.exit(f"\nstopped at step {step}; run the same command with --resume to go on")
    bar.close()
    save_checkpoint(checkpoint, model, optimizer, {**state, "step": step, "seconds": seconds})
    return model


# ----------------------------------------------------------------------------------- the outcome


def save_model(model: LlamaForCausalLM, tokenizer: Tokenizer, recipe: Recipe, out: Path) -> None:
    """Write the model in bf16, its configurations and its tokenizer."""
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=False
    )
    model.save_pretrained(out)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        model_max_length=recipe.longest, clean_up_tokenization_spaces=False,
        padding_side="left",
    )  # fmt: skip
    fast.save_pretrained(out)


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, item: Item) -> str:
    """Return what the model generates greedily for an item."""
    inputs = tokenizer(item.prompt, return_tensors="pt").to(model.device)
    out = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
        max_new_tokens=item.max_new_tokens, do_sample=False,
    )  # fmt: skip
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def evaluation_cells(recipe: Recipe, longeval: str | None) -> list[tuple[str, Task, int, int]]:
    """Return (label, task, items, length) of everything that is evaluated, the longest first."""
    n = recipe.evaluation_items
    cells: list[tuple[str, Task, int, int]] = []
    for length in sorted(recipe.evaluation_lengths, reverse=True):
        cells.append(("lines", Lines(), n, length))
        cells.append(("needle", Needle(), n, length))
        cells.append(("needle, codes", Needle(values="code"), max(n // 2, 1), length))
    for path in sorted(Path(longeval).glob("*.jsonl")) if longeval else ():
        count = len(path.read_text(encoding="utf-8").splitlines())
        cells.append(("longeval", LongEval(path), count, recipe.longest))
    return cells


def evaluate_cell(
    cell: tuple[str, Task, int, int], out: Path, device: str, seed: int
) -> dict[str, Any]:
    """Reload the saved model and return the row of one cell, with full attention."""
    label, task, n, length = cell
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=dtype).to(device).eval()
    started = time.perf_counter()
    scores, tokens, wrong = [], [], []
    items = task.items(tokenizer, n, length, seed)
    for item in items:
        text = answer(model, tokenizer, item)
        scores.append(task.score(item, text))
        tokens.append(len(tokenizer(item.prompt)["input_ids"]))
        if scores[-1] < 1:
            wrong.append({**item.meta, "expected": item.answers[0], "received": text})
    row = {
        "task": label, "group": items[0].group, "items": n, "score": sum(scores) / n,
        "prompt_tokens": sum(tokens) / n, "seconds": round(time.perf_counter() - started, 1),
        "wrong": wrong[:10],
    }  # fmt: skip
    if isinstance(task, LongEval):
        row["answer_prefix"] = task.answer_prefix
    print(f"{label:13} {row['group']:13} {row['score']:7.1%}  n {n}", flush=True)
    return row


def evaluate(recipe: Recipe, out: Path, device: str, longeval: str | None) -> list[dict[str, Any]]:
    """Return one row for each task and length; on a GPU several processes share it."""
    cells = evaluation_cells(recipe, longeval)
    if not device.startswith("cuda"):
        return [evaluate_cell(cell, out, device, 1) for cell in cells]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(8, recipe.workers), mp_context=context) as pool:
        rows = [pool.submit(evaluate_cell, cell, out, device, 1) for cell in cells]
        return [row.result() for row in rows]


def average(first: Path, second: Path, share: float, out: Path) -> list[dict[str, Any]]:
    """Write the average of two trained models and return its phases.

    The second must have been trained from the first (``--start``): then the weights between them
    work as well, and keep of both what each does better.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share: expected 0 to 1, received {share}; pass 0.5 for the middle")
    out.mkdir(parents=True, exist_ok=True)
    for path in second.iterdir():
        if path.is_file():
            shutil.copyfile(path, out / path.name)
    old = load_file(str(first / "model.safetensors"))
    new = load_file(str(second / "model.safetensors"))
    mixed = {
        name: torch.lerp(old[name].float(), weight.float(), share).to(weight.dtype)
        for name, weight in new.items()
    }
    write_atomically(
        out / "model.safetensors", lambda beside: save_file(mixed, str(beside), {"format": "pt"})
    )
    phases = json.loads((second / "evaluation.json").read_text(encoding="utf-8"))["phases"]
    return [*phases, {"average": share}]


def _phase(index: int, phase: dict[str, Any]) -> str:
    """Return the model card's line on one phase of training."""
    if "average" in phase:
        return (
            f"* The weights are {1 - phase['average']:.0%} those of the phase before last and "
            f"{phase['average']:.0%} those of the last phase."
        )
    recipe, last = phase["recipe"], phase["training"]
    stages = ", ".join(f"{length:,} ({share:.0%})" for length, share in recipe["stages"])
    own = recipe.get("own", 0.0)
    return (
        f"* Phase {index}: {last['seconds'] / 60:.1f} minutes, {last['step']:,} steps of "
        f"{recipe['tokens']:,} tokens, learning rate {recipe['learning_rate']}, decayed over the "
        f"last {1 - recipe['decay_from']:.0%} of the time, {recipe.get('facts', 0.25):.0%} of the "
        f"documents with hidden facts. Sequence lengths by share of the time: {stages}; after the "
        f"first stage {recipe['shorter']:.0%} of the steps use a shorter length. "
        + (
            f"{own:.0%} of the documents with facts are worded as the project's needle task. "
            if own
            else ""
        )
        + phase.get("note", "")
    )


def model_card(
    recipe: Recipe, phases: list[dict[str, Any]], rows: list[dict[str, Any]], device: str
) -> str:
    """Return the model card."""
    corpus_sources, tokens_of_text = phases[0]["sources"], phases[0]["text_tokens"]
    results = "\n".join(
        f"| {row['task']} | {row['group']} | {row['prompt_tokens']:,.0f} | {row['items']} "
        f"| {row['score']:.1%} |"
        for row in rows
    )
    sources = "\n".join(
        f"| {source['name']} | {source['licence']} | {source['characters'] / 1e6:.1f} |"
        for source in corpus_sources
    )
    trained = "\n".join(_phase(index, phase) for index, phase in enumerate(phases, 1))
    minutes = sum(phase["training"]["seconds"] for phase in phases if "training" in phase) / 60
    prefix = next((row["answer_prefix"] for row in rows if "answer_prefix" in row), None)
    official = (
        f"LongEval: the official files, never trained or tuned on, scored by the last integer; "
        f"every prompt is continued by the answer prefix `{prefix}`.\n" if prefix else ""
    )  # fmt: skip
    return f"""---
license: apache-2.0
library_name: transformers
tags: [dynmask, sparse-attention, long-context, retrieval, tiny]
---
# dynmask-reference

A Llama of 7.3M parameters that really retrieves over {recipe.evaluation_lengths[-1]:,} tokens. It
exists to test and to show attention masks: small enough to ship with a repository, good enough
that a mask which loses the answer is seen at once. It is no assistant: it knows nothing but how to
look things up in its context.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("models/dynmask-reference")
model = AutoModelForCausalLM.from_pretrained("models/dynmask-reference")
prompt = "kale-zorim: 4821\\nbrin-tosal: 77\\nWhat is the value of kale-zorim?\\nkale-zorim:"
out = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=12)
print(tokenizer.decode(out[0]))
```

## Shape
{recipe.layers} layers, width {recipe.hidden}, {recipe.heads} query heads and {recipe.kv_heads} key
and value heads of {recipe.head_dim}, SwiGLU {recipe.intermediate}, RMSNorm, rotary base
{recipe.rope_theta:,.0f}, tied embeddings; byte-level BPE of {recipe.vocabulary:,} entries whose
digits stand alone. Weights in bf16, safetensors. Trained on sequences of up to
{recipe.longest:,} tokens; beyond that it does not retrieve.

## Results
Full attention, greedy, after the cast to bf16 and a reload, on words, names and prose that
training never used. The last phase saw the wording of the project's own tasks (lines, needle), no
phase that of LongEval.

| task | group | mean prompt tokens | items | right |
|---|---|---|---|---|
{results}

{official}
## How it was trained
`recipes/train_reference.py`, from scratch on {device} in {minutes:.1f} minutes, AdamW (betas
{recipe.betas}, weight decay {recipe.weight_decay}), bf16.

{trained}

A fifth of the documents is plain text, the others are text with facts hidden in it and asked at the
end, and keyed records with questions among or after them. The loss weighs answers and plain text 1,
text around facts 0.5, records 0.1. `training.jsonl` is the log, `evaluation.json` has every figure
and wrong answers.

## Text
{tokens_of_text / 1e6:.0f}M tokens of source code, documentation and docstrings of permissively
licensed software, read from the training machine. The text of `pydoc_data`, which the needle task
uses as its haystack, is excluded. Generated records use generated words and words of this text.
One word in ten, chosen by a hash, is never a key in training; evaluation draws from these only.

| source | licence as its metadata states | million characters |
|---|---|---|
{sources}

## Licence and use
Apache-2.0. For testing, demonstrating and teaching sparse attention. It may repeat fragments of the
sources above and must not be used as a source of facts.
"""


def run_phase(recipe: Recipe, options: argparse.Namespace, out: Path) -> list[dict[str, Any]]:
    """Train, save the model, and return what is known about it and its earlier phases."""
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)

    started = time.perf_counter()
    if options.resume and (work / "text.safetensors").is_file():
        corpus = load_corpus(work)
    else:
        given = (
            Tokenizer.from_file(str(options.start / "tokenizer.json")) if options.start else None
        )
        corpus = build_corpus(
            recipe.characters, recipe.characters_per_source, recipe.vocabulary, given
        )
        save_corpus(work, corpus)
    text = len(corpus.code) + len(corpus.prose)
    print(
        f"text: {text / 1e6:.1f}M tokens ({len(corpus.prose) / 1e6:.1f}M prose) of "
        f"{len(corpus.sources)} sources, {len(corpus.words):,} words, "
        f"{time.perf_counter() - started:.0f} s",
        flush=True,
    )
    # Workers are forked before the device is touched.
    ahead = 4 if options.smoke else 2 * recipe.workers
    author = Author(corpus, recipe.facts, recipe.own)
    batches = Batches(author, recipe.seed, recipe.tokens, recipe.workers, ahead)
    try:
        model = train(recipe, corpus, batches, out, options.device, options)
    finally:
        batches.close()
    save_model(model, corpus.tokenizer, recipe, out)
    with open(out / "training.jsonl", encoding="utf-8") as file:
        last = json.loads(file.readlines()[-1])
    phases: list[dict[str, Any]] = []
    if options.start:
        before = (options.start / "evaluation.json").read_text(encoding="utf-8")
        phases = json.loads(before)["phases"]
    phase = {"recipe": asdict(recipe), "training": last, "sources": corpus.sources}
    return [*phases, {**phase, "text_tokens": text}]


def main() -> None:
    """Run the recipe."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, help="training time (default: 14.5)")
    parser.add_argument("--out", type=Path, default=Path("models/dynmask-reference"))
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--start", type=Path, help="a trained model: run the short second phase")
    parser.add_argument("--average", type=Path, nargs=2, metavar=("FIRST", "SECOND"),
                        help="average two models, the second trained from the first")  # fmt: skip
    parser.add_argument("--share", type=float, default=0.7, help="of the second in an average")
    parser.add_argument("--evaluate", type=int, nargs="*", metavar="TOKENS",
                        help="prompt lengths of the evaluation")  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="toy sizes: does it run through?")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10**9, help="stop after so many steps")
    parser.add_argument("--log-seconds", type=float, default=5.0)
    parser.add_argument("--longeval", help="folder of official LongEval files, for evaluation")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None)
    options = parser.parse_args()
    if options.compile is None:
        options.compile = options.device.startswith("cuda")
    recipe = Recipe(seed=options.seed)
    if options.smoke:
        recipe = replace(smoke(recipe), minutes=0.3)
    if options.start:
        recipe = polish(recipe)
    if options.minutes:
        recipe = replace(recipe, minutes=options.minutes)
    if options.evaluate is not None:
        recipe = replace(recipe, evaluation_lengths=tuple(options.evaluate))
    torch.set_float32_matmul_precision("high")
    out: Path = options.out
    if options.average:
        phases = average(*options.average, options.share, out)
    else:
        phases = run_phase(recipe, options, out)
    rows = evaluate(recipe, out, options.device, options.longeval)
    on_gpu = options.device.startswith("cuda")
    device = "one " + torch.cuda.get_device_name() if on_gpu else "a CPU"
    versions = {name: sys.modules[name].__version__ for name in ("torch", "transformers")}
    versions["python"] = sys.version.split()[0]
    write_json(
        out / "evaluation.json",
        {"device": device, "versions": versions, "phases": phases, "rows": rows},
    )
    card = model_card(recipe, phases, rows, device)
    write_atomically(out / "README.md", lambda beside: beside.write_text(card, encoding="utf-8"))
    print(f"done: {out}", flush=True)


if __name__ == "__main__":
    main()
