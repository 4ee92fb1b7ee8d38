"""``dynmask generate``: answer a prompt under a policy."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .common import (
    INTERRUPTED,
    OK,
    POLICY_HELP,
    add_model_options,
    add_prompt_options,
    load,
    positions_of,
    positive,
    read_prompt,
    resolve_policy,
    say,
    text_parts,
)

__all__ = ["DESCRIPTION", "EPILOG", "HELP", "add_arguments", "run"]

HELP = "continue a prompt with a sparse mask, streaming the text"
DESCRIPTION = """\
Continue a prompt. The text streams to standard output; what mask ran, its density,
the speed and what the memory was used for go to standard error.
"""
EPILOG = """\
examples:
  dynmask generate --model MODEL --prompt "Once upon a time" --max-new-tokens 50
  dynmask generate --model MODEL --policy streaming:sinks=4,window=2048 --file long.txt
  cat question.txt | dynmask generate --model MODEL --policy dam:my-card --chat
  dynmask generate --model MODEL --policy retained:my-card,width=512 --file book.txt
  dynmask generate --model MODEL --policy gated:my-card,decode=keep --file book.txt
  dynmask generate --model MODEL --policy streaming --file million.txt --no-density

Under streaming, retained and h2o the cache holds no more keys than a query reads, and
the prompt goes in a few thousand tokens at a time. Under gated it drops, after the prompt,
what no later token reads: nothing, as decoded tokens read every key, unless decode=select
leaves some unread; with decode=keep all but the chosen keys and a window.
A long prompt is read in chunks (--chunk), with a bar; a line says whether the policy then
reads what it would in the whole prompt. A file is read and tokenized a part at a time.
Ctrl-C ends with what was generated so far.
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_model_options(command)
    add_prompt_options(command)
    command.add_argument("--policy", default="full", metavar="POLICY", help=POLICY_HELP)
    command.add_argument(
        "--max-new-tokens", type=positive, default=128, metavar="N", help="at most so many (128)"
    )
    command.add_argument(
        "--chunk",
        type=_tokens,
        metavar="TOKENS",
        help="tokens of the prompt to read at once; 0 reads it whole (default: 8192 for longer "
        "prompts where the cache holds only what is still read, else 65536; full reads it whole)",
    )
    command.add_argument(
        "--offload",
        action="store_true",
        help="gated with decode=select or keep: keep keys and values of maps that choose blocks in "
        "host memory, and copy the blocks that a token reads",
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
    prompt = _prompt(arguments)
    policy = resolve_policy(arguments.policy)
    if arguments.offload and getattr(policy, "decode", "full") == "full":
        raise ValueError(
            f"--offload: expected a gated policy with maps that choose blocks, and decode=select "
            f"or decode=keep, received {arguments.policy}; leave it out, or say how to decode"
        )
    model, tokenizer = load(arguments, [policy])
    ids = _encode(tokenizer, prompt, arguments)

    from dynmask.evals.engine import check_policies
    from dynmask.evals.generation import attend
    from dynmask.integrations.prefill import chunk_note, chunk_size, default_chunk
    from dynmask.policies import Causal

    if policy is not None:
        check_policies(model, {arguments.policy: policy})
    tokens = ids.shape[1]
    limit = positions_of(model)
    if limit is not None and tokens + arguments.max_new_tokens > limit:
        say(f"note: {tokens} tokens and {arguments.max_new_tokens} new ones are beyond the {limit} "
            "positions the model was made for")  # fmt: skip
    chunk = default_chunk(policy, tokens) if arguments.chunk is None else arguments.chunk
    chunk = chunk if chunk < tokens else 0
    if chunk:
        say(f"[{chunk_note(policy, tokens, chunk)}]")
        # the model's own attention would make a mask of queries x keys
        policy = Causal() if policy is None else policy
    streamer = _streamer(tokenizer, echo=not arguments.json)
    with attend(model, policy, measure=not arguments.no_density) as active:
        shown = chunk > 0 and not arguments.quiet
        work = Work(model, active, ids, chunk, streamer, shown=shown, offload=arguments.offload)
        work.run(
            max_new_tokens=arguments.max_new_tokens,
            pad_token_id=_pad(model, tokenizer),
            **_sampling(arguments),
        )
        summary = active.summary() if active is not None else None
    new = streamer.ids
    stats = {
        "policy": arguments.policy,
        "prompt_tokens": tokens,
        "new_tokens": len(new),
        **streamer.speed(),
        "density_prefill": summary and summary["prefill"]["density"],
        "density_decode": summary and summary["decode"]["density"],
        "chunk": chunk,
        "memory": work.memory(),
        "stopped": work.stopped,
    }
    if arguments.json:
        text = tokenizer.decode(new, skip_special_tokens=True)
        print(json.dumps({"text": text, **stats}, indent=1))
    else:
        say(_sentence(stats))
        read = chunk_size(work.active.policy, tokens, chunk) if chunk else 0
        say(_memory_sentence(stats["memory"], read))
    if work.stopped:
        say("stopped")
    return INTERRUPTED if work.stopped else OK


class Work:
    """A prompt that is read and continued, and the memory that it takes.

    Args:
        model: in eval mode on its device.
        active: the run, or None for the model's own attention.
        ids: int64 [1, tokens].
        chunk: tokens read at once; 0 for all.
        streamer: hears of the tokens.
        shown: draw a bar.
        offload: keep on the host what is rarely read.
    """

    def __init__(
        self,
        model: Any,
        active: Any,
        ids: Any,
        chunk: int,
        streamer: Any,
        *,
        shown: bool,
        offload: bool = False,
    ) -> None:
        self.model, self.active, self.ids = model, active, ids
        self.chunk, self.streamer, self.shown, self.offload = chunk, streamer, shown, offload
        self.read = 0
        self.stopped = False
        self._cache_bytes = self._host_bytes = 0
        self._cache: Any = None

    def run(self, **settings: Any) -> None:
        """Read and generate, until it is done or Ctrl-C comes."""
        from tqdm.auto import tqdm

        from dynmask.evals.memory import PeakMemory

        total = self.ids.shape[1]
        with (
            tqdm(total=total, desc="prompt", unit="token", disable=not self.shown) as bar,
            PeakMemory(self.model.device) as self._peak,
        ):
            try:
                self._run(bar, settings)
            except KeyboardInterrupt:
                self.stopped = True
            self.streamer.finish()
            self._look()

    def _run(self, bar: Any, settings: dict[str, Any]) -> None:
        from dynmask.evals.generation import bounded_cache, needed_cache
        from dynmask.integrations.prefill import cache_for, read_chunks

        total = self.ids.shape[1]
        if self.chunk or self.offload:
            cache = cache_for(self.active, total if self.chunk else 0, self.offload)
        else:
            needed = needed_cache(self.active)  # refuses where the policy cannot decode
            cache = bounded_cache(self.active) if needed is None else needed
        self._cache = cache

        def heard(tokens: int) -> None:
            self.read += tokens
            bar.update(tokens)
            self._look()

        def first() -> None:
            bar.update(total - bar.n)
            bar.close()

        self.streamer.first_came = first
        if self.chunk:
            policy = self.active.policy
            read_chunks(self.model, self.ids, cache, self.chunk, heard, policy)
        ids = self.ids.to(self.model.device)
        out = self.model.generate(
            input_ids=ids,
            attention_mask=ids.new_ones(ids.shape),
            streamer=self.streamer,
            return_dict_in_generate=True,
            **({} if cache is None else {"past_key_values": cache}),
            **settings,
        )
        self._cache = out.past_key_values

    def _look(self) -> None:
        """Note how much the cache holds: one that drops keys held most before it did."""
        from dynmask.integrations.prefill import cache_bytes

        self._cache_bytes = max(self._cache_bytes, cache_bytes(self._cache) or 0)
        self._host_bytes = max(self._host_bytes, getattr(self._cache, "host_nbytes", 0))

    def memory(self) -> dict[str, Any]:
        """Bytes at the peak: all, those of the weights, of the cache, and the rest.

        What was offloaded is in the host's memory: part of the whole on a CPU alone.
        """
        tensors = {x.data_ptr(): x for x in (*self.model.parameters(), *self.model.buffers())}
        weights, peak = sum(x.nbytes for x in tensors.values()), self._peak
        on_gpu = self.model.device.type == "cuda"
        # a process on a CPU holds more than weights before it starts, and reuses what is free
        total = (peak.start if on_gpu else weights) + peak.bytes
        known = weights + self._cache_bytes + (0 if on_gpu else self._host_bytes)
        total = max(total, known)
        return {
            "peak_bytes": total,
            "weight_bytes": weights,
            "cache_bytes": self._cache_bytes,
            "offloaded_bytes": self._host_bytes,
            "rest_bytes": total - known,
            "method": peak.method,
        }


def _tokens(text: str) -> int:
    """Parse a whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, received {text}")
    return value


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """How the next token is chosen."""
    if arguments.temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": arguments.temperature, "top_p": arguments.top_p}


def _prompt(arguments: argparse.Namespace) -> str | Path:
    """The prompt, or the file that holds it, looked through but not kept.

    Raises:
        ValueError: if there is none, or the file cannot be read as text.
    """
    if arguments.file is None:
        return read_prompt(arguments)
    path, blank = Path(arguments.file), True
    if path.exists() and not path.is_file():  # a pipe can be read once
        return read_prompt(arguments)
    for part in text_parts(path):
        blank = blank and not part.strip()
    if blank:
        raise ValueError("prompt: expected a text, received an empty one; pass --prompt or --file")
    return path


def _encode(tokenizer: Any, prompt: str | Path, arguments: argparse.Namespace) -> Any:
    """Token ids of the prompt: int64 [1, n]; a file's text is never held as a whole."""
    from tqdm.auto import tqdm

    from dynmask.integrations.tokens import stream_ids

    if arguments.chat:
        if not tokenizer.chat_template:
            raise ValueError(
                "--chat: expected a model with a chat template, received one without it"
            )
        # a template may do anything with the text: it gets the whole of it
        text = prompt if isinstance(prompt, str) else "".join(text_parts(prompt))
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
    hidden = arguments.quiet or isinstance(prompt, str)
    with tqdm(desc="tokenizing", unit="token", disable=hidden, delay=1) as bar:
        special = not arguments.chat
        return stream_ids(
            tokenizer, text_parts(prompt), special=special, heard=lambda n: bar.update(n)
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
            self.ids: list[int] = []
            self.first_came: Callable[[], None] = lambda: None
            self._ended = False

        def put(self, value: Any) -> None:
            self.count += 1
            self.last = time.perf_counter()
            if self.count >= 1:
                self.ids += value.flatten().tolist()
            if self.count == 1:
                self.first = self.last
                self.first_came()
            super().put(value)

        def end(self) -> None:
            self._ended = True
            super().end()

        def finish(self) -> None:
            """Tell of what is still held back, where generation was stopped."""
            if self.ids and not self._ended:
                self.end()

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if echo:
                sys.stdout.write(text + ("\n" if stream_end else ""))
                sys.stdout.flush()

        def speed(self) -> dict[str, float | None]:
            steps = self.count - 1
            decode = self.last - self.first
            return {
                "first_token_seconds": self.first - self.began if self.count > 0 else None,
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
    if stats["first_token_seconds"] is None:
        parts.append("no token yet")
    else:
        parts.append(f"first token after {stats['first_token_seconds']:.2f} s")
    if stats["ms_per_token"] is not None:
        parts.append(f"then {stats['ms_per_token']:.1f} ms a token")
    return "[" + "; ".join(parts) + "]"


def _memory_sentence(memory: dict[str, Any], chunk: int) -> str:
    names = ("peak_bytes", "weight_bytes", "cache_bytes", "rest_bytes")
    peak, weights, cache, rest = (_size(memory[name]) for name in names)
    what = f"one chunk of {chunk:,} tokens" if chunk else "the whole prompt at once"
    away = memory["offloaded_bytes"]
    cache += f" + {_size(away)} in host memory" if away else ""
    return (
        f"[peak memory {peak}: weights {weights} + cache {cache} + {rest} for the rest, "
        f"activations of {what}; {memory['method']}]"
    )


def _size(size: float) -> str:
    """A number of bytes to read."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
