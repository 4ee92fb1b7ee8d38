"""``dynmask generate``: answer a prompt under a policy."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from .common import (
    OK,
    POLICY_HELP,
    add_model_options,
    add_prompt_options,
    load,
    positive,
    read_prompt,
    resolve_policy,
    say,
)

__all__ = ["DESCRIPTION", "EPILOG", "HELP", "add_arguments", "run"]

HELP = "continue a prompt with a sparse mask, streaming the text"
DESCRIPTION = """\
Continue a prompt. The text streams to standard output; what mask ran, its density
and the speed go to standard error.
"""
EPILOG = """\
examples:
  dynmask generate --model MODEL --prompt "Once upon a time" --max-new-tokens 50
  dynmask generate --model MODEL --policy streaming:sinks=4,window=2048 --file long.txt
  cat question.txt | dynmask generate --model MODEL --policy dam:my-card --chat
  dynmask generate --model MODEL --policy retained:my-card,width=512 --file book.txt
  dynmask generate --model MODEL --policy gated:my-card,decode=keep --file book.txt

Under streaming and retained the cache holds no more keys than a query reads, and the
prompt goes in a few thousand tokens at a time. Under gated it drops, after the prompt,
what no later token reads; with decode=keep that is all but the chosen keys and a window.
"""

CHUNK = 8192
"""Tokens of a prompt that are read at once where the cache is bounded."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_model_options(command)
    add_prompt_options(command)
    command.add_argument("--policy", default="full", metavar="POLICY", help=POLICY_HELP)
    command.add_argument(
        "--max-new-tokens", type=positive, default=128, metavar="N", help="at most so many (128)"
    )
    command.add_argument(
        "--temperature", type=float, default=0.0, help="0 always takes the likeliest token (0)"
    )
    command.add_argument("--top-p", type=float, default=1.0, help="nucleus of the sampling (1)")
    command.add_argument(
        "--chat", action="store_true", help="wrap the prompt in the model's chat template"
    )
    command.add_argument(
        "--no-density",
        action="store_true",
        help="do not count densities: the counting is part of the speed that is shown",
    )


def run(arguments: argparse.Namespace) -> int:
    """Generate and print."""
    if arguments.temperature < 0 or not 0 < arguments.top_p <= 1:
        raise ValueError(
            f"--temperature and --top-p: expected at least 0 and a share in (0, 1], received "
            f"{arguments.temperature} and {arguments.top_p}; leave them out for greedy decoding"
        )
    prompt = read_prompt(arguments)
    policy = resolve_policy(arguments.policy)
    model, tokenizer = load(arguments)
    inputs = _encode(tokenizer, prompt, arguments.chat).to(model.device)

    from dynmask.evals.engine import check_policies
    from dynmask.evals.generation import attend

    if policy is not None:
        check_policies(model, {arguments.policy: policy})
    sampling: dict[str, Any] = {"do_sample": False}
    if arguments.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": arguments.temperature,
            "top_p": arguments.top_p,
        }
    streamer = _streamer(tokenizer, echo=not arguments.json)
    with attend(model, policy, measure=not arguments.no_density) as active:
        output = model.generate(
            **inputs,
            max_new_tokens=arguments.max_new_tokens,
            streamer=streamer,
            pad_token_id=_pad(model, tokenizer),
            **sampling,
            **_bounded(active, inputs["input_ids"].shape[1]),
        )
        summary = active.summary() if active is not None else None
    new = output[0, inputs["input_ids"].shape[1] :]
    stats = {
        "policy": arguments.policy,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "new_tokens": len(new),
        **streamer.speed(),
        "density_prefill": summary and summary["prefill"]["density"],
        "density_decode": summary and summary["decode"]["density"],
    }
    if arguments.json:
        text = tokenizer.decode(new, skip_special_tokens=True)
        print(json.dumps({"text": text, **stats}, indent=1))
    else:
        say(_sentence(stats))
    return OK


def _bounded(active: Any, tokens: int) -> dict[str, Any]:
    """Return what makes generate keep only the keys that are still read, where some are not."""
    from dynmask import BoundedCache
    from dynmask.evals.generation import bounded_cache
    from dynmask.policies.base import evicts

    if active is not None and evicts(active.policy):
        return {
            "past_key_values": BoundedCache(active),
            **({"prefill_chunk_size": CHUNK} if tokens > CHUNK else {}),
        }
    cache = bounded_cache(active)
    return {} if cache is None else {"past_key_values": cache}


def _encode(tokenizer: Any, prompt: str, chat: bool) -> Any:
    if not chat:
        return tokenizer(prompt, return_tensors="pt")
    if not tokenizer.chat_template:
        raise ValueError("--chat: expected a model with a chat template, received one without it")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )


def _pad(model: Any, tokenizer: Any) -> int | None:
    """Return some id, so that generate does not warn that it has to choose one."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    end = model.generation_config.eos_token_id
    return end[0] if isinstance(end, list) else end


def _streamer(tokenizer: Any, *, echo: bool) -> Any:
    from transformers import TextStreamer

    class Timed(TextStreamer):
        """Streams text and notes when tokens arrive."""

        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.began = self.first = self.last = time.perf_counter()
            self.count = -1  # the prompt arrives first

        def put(self, value: Any) -> None:
            self.count += 1
            self.last = time.perf_counter()
            if self.count <= 1:
                self.first = self.last
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if echo:
                sys.stdout.write(text + ("\n" if stream_end else ""))
                sys.stdout.flush()

        def speed(self) -> dict[str, float | None]:
            steps = self.count - 1
            decode = self.last - self.first
            return {
                "first_token_seconds": self.first - self.began,
                "ms_per_token": 1000 * decode / steps if steps > 0 else None,
            }

    return Timed()


def _sentence(stats: dict[str, Any]) -> str:
    parts = [
        f"policy {stats['policy']}",
        f"{stats['prompt_tokens']} + {stats['new_tokens']} tokens",
    ]
    for phase in ("prefill", "decode"):
        density = stats[f"density_{phase}"]
        if density is not None:
            parts.append(f"{phase} density {100 * density:.1f} %")
    parts.append(f"first token after {stats['first_token_seconds']:.2f} s")
    if stats["ms_per_token"] is not None:
        parts.append(f"then {stats['ms_per_token']:.1f} ms a token")
    return "[" + "; ".join(parts) + "]"
