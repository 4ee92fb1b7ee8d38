"""What the commands share: model options, loading, prompts, policies."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

__all__ = [
    "FAILURE",
    "INTERRUPTED",
    "OK",
    "USAGE",
    "add_model_options",
    "add_prompt_options",
    "by_options",
    "count",
    "load",
    "policy_label",
    "positive",
    "read_prompt",
    "resolve_policy",
    "say",
    "text_parts",
]

OK, FAILURE, USAGE, INTERRUPTED = 0, 1, 2, 130

POLICY_HELP = (
    "what each query reads: full (the model's own attention), streaming, vertical_slash, pooled, "
    "h2o, snapkv, gated, elastic, flexprefill, xattention, quest, oracle_tokens, oracle_blocks, "
    "each with optional settings as in streaming:sinks=4,window=1024, or dam:FOLDER, "
    "retained:FOLDER or gated:FOLDER with a card made by dynmask calibrate; "
    "retained:FOLDER,width=512 keeps 512 keys, and budget=per_head spreads them over the heads; "
    "h2o keeps in prompts and while decoding the keys that received most attention; "
    "gated chooses for prompts, decoded tokens read every key, or what the card was judged with; "
    "gated:FOLDER,decode=select chooses for them too, gated:FOLDER,decode=keep drops what the "
    "prompt's last queries did not choose, gated:FOLDER,decode=full reads every key, "
    "gated:FOLDER,dense_up_to=8192 reads inputs of so many tokens whole, "
    "gated:FOLDER,guard=0.1 lets a map fall short of its promise by so much (none: never looks), "
    "and gated:FOLDER,soft=true,strength=1 has soft masks"
)


def say(text: str) -> None:
    """Print a line to stderr, where everything but results goes."""
    print(text, file=sys.stderr, flush=True)


def by_options(text: str, command: argparse.ArgumentParser, given: argparse.Namespace) -> str:
    """Return an error's text with options where the library names its arguments.

    A text that begins with a setting of the command (``settings.max_kl: expected ...``), or with an
    argument of its name that was given, is about that option; so are the names in it that no
    sentence has (``max_kl``) and those that it says to leave out, to raise or to lower. Any other
    text stays as it is: a card has settings of its own, which no option changes.

    Args:
        text: of the error.
        command: the parser of the command that was run.
        given: its arguments.
    """
    names = {
        action.dest: max(action.option_strings, key=len, default=str(action.metavar))
        for action in command._actions
    }
    about = re.match(r"(settings\.)?(\w+): expected ", text)
    if about is None or about[2] not in names:
        return text
    if about[1] is None and getattr(given, about[2], None) in (None, False, []):
        return text

    def named(found: re.Match[str]) -> str:
        name = next(group for group in found.groups() if group is not None)
        return names.get(name, found[0])

    # what was received may be what was typed: it stays
    expected, received, remedy = re.fullmatch(
        r"(.*?)(, received .*?)?([.;] .*)?", text[about.end() :], re.DOTALL
    ).groups("")  # type: ignore[union-attr]
    told = _NAMES.sub(named, expected) + received + _NAMES.sub(named, remedy)
    return f"{names[about[2]]}: expected {told}"


_NAMES = re.compile(
    r"settings\.(\w+)"
    r"|(?<=[Ll]eave )(\w+)(?= out\b)|(?<=[Rr]aise |[Ll]ower )(\w+)"
    r"|(?<![\w/.'\"-])(\w+_\w+)(?![\w/'\"-]|\.\w)"  # not in a path, nor in what was typed
)
"""Where an error's text may name an argument."""


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, received {text}")
    return value


def count(text: str) -> int:
    """Parse a whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, received {text}")
    return value


def add_model_options(command: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add ``--model`` and how to run it."""
    group = command.add_argument_group("model")
    group.add_argument(
        "--model",
        required=required,
        metavar="MODEL",
        help="folder or Hugging Face hub name of a causal language model",
    )
    group.add_argument("--revision", help="branch, tag or commit on the hub")
    group.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)"
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="numbers to compute with (default: float32 on a CPU, else those of the checkpoint)",
    )
    add_run_options(command)


def add_run_options(command: argparse.ArgumentParser) -> None:
    """Add the options that every command has."""
    group = command.add_argument_group("running")
    group.add_argument("--threads", type=positive, metavar="N", help="CPU threads")
    group.add_argument("--seed", type=int, default=0, help="seed of every random choice (0)")
    group.add_argument("--json", action="store_true", help="print the result as JSON to stdout")
    group.add_argument("--quiet", action="store_true", help="no progress bars")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_prompt_options(command: argparse.ArgumentParser) -> None:
    """Add where a prompt comes from."""
    group = command.add_argument_group("prompt (standard input if neither is given)")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="the prompt itself")
    source.add_argument("--file", metavar="FILE", help="a file that holds the prompt")


def read_prompt(arguments: argparse.Namespace) -> str:
    """Return the prompt from the argument, the file or standard input.

    Raises:
        ValueError: if there is none, or the file cannot be read as text.
    """
    if arguments.prompt is not None:
        prompt = arguments.prompt
    elif arguments.file is not None:
        prompt = read_text(Path(arguments.file))
    elif sys.stdin is None or sys.stdin.isatty():
        raise ValueError("prompt: expected a text, received none; pass --prompt or --file")
    else:
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise ValueError("prompt: expected a text, received an empty one; pass --prompt or --file")
    return prompt


PART = 2**18
"""Characters of a text that are handed on at once."""


def read_text(path: Path) -> str:
    """Return a file as text.

    Raises:
        ValueError: if it is missing or not UTF-8.
    """
    return "".join(text_parts(path))


def text_parts(source: str | Path) -> Iterator[str]:
    """Return a text, or that of a file, a part at a time; a file is not held as a whole.

    Raises:
        ValueError: if a file is missing or not UTF-8.
    """
    if isinstance(source, str):
        yield from (source[first : first + PART] for first in range(0, len(source), PART))
        return
    try:
        with source.open(encoding="utf-8") as file:
            while part := file.read(PART):
                yield part
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(
            f"{source}: expected a readable text file, received {reason}; check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{source}: expected UTF-8 text, received other bytes; convert the file first"
        ) from error


def resolve_policy(spec: str) -> Any:
    """Return the policy of a text form; ``None`` for ``full``, the model's own attention.

    Raises:
        ValueError: if the form or a setting is unknown, or a card cannot be read.
    """
    if spec in ("full", "full:"):
        return None
    from dynmask import policies

    return policies.parse(spec)


def policy_label(spec: str) -> str:
    """Return the name of a policy in tables: a card's folder without the path to it."""
    name, _, rest = spec.partition(":")
    from dynmask.policies import split_card, takes_card

    if not rest or not takes_card(spec):
        return spec
    path, options = split_card(rest, name)
    return ",".join([f"{name}:{Path(path).name}", *(f"{k}={v}" for k, v in options.items())])


def check_output_folder(name: str) -> None:
    """Look, before any work, whether a folder for results can be made; nothing is made yet.

    Raises:
        ValueError: if the path or what it leads through is a file or cannot be written to.
    """
    folder = Path(name).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "read-only" if there.is_dir() else "a file"
        raise ValueError(
            f"--out: expected a folder that can be written, received {name}, where {there} is "
            f"{what}; choose another"
        )


def use_threads(arguments: argparse.Namespace) -> None:
    """Apply ``--threads``."""
    if arguments.threads:
        import torch

        torch.set_num_threads(arguments.threads)


def load(arguments: argparse.Namespace, policies: Iterable[Any] = ()) -> tuple[Any, Any]:
    """Return the model, in eval mode on its device, and its tokenizer.

    Cards of ``policies`` that are of a model of another shape are refused before weights are read.

    Raises:
        ValueError: if there is no such model, device or tokenizer, or a card is of another model.
        RuntimeError: if transformers is missing.
    """
    use_threads(arguments)
    import torch

    device = _device(arguments.device)
    try:
        import transformers
    except ImportError as error:
        raise RuntimeError(
            "this command needs transformers: pip install 'dynmask[transformers]'"
        ) from error
    transformers.logging.set_verbosity_error()
    if arguments.quiet or Path(arguments.model).exists():
        transformers.logging.disable_progress_bar()  # only a download is worth a bar
    torch.manual_seed(arguments.seed)
    dtype = arguments.dtype
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    where = {"revision": arguments.revision} if arguments.revision else {}
    name = arguments.model
    if not Path(name).exists() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise ValueError(
            f"--model: expected a folder or a hub name such as owner/name, received {name!r}, "
            "which is not here; check the path"
        )
    cards = [card for card in (getattr(x, "card", None) for x in policies) if card is not None]
    try:
        config = transformers.AutoConfig.from_pretrained(name, **where) if cards else None
    except (OSError, ValueError, KeyError) as error:
        raise _no_model(name, error) from error
    for card in cards:
        card.check_shape(config)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **where)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **where)
    except (OSError, ValueError, KeyError) as error:
        raise _no_model(name, error) from error
    return model.to(device).eval(), tokenizer


def positions_of(model: Any) -> int | None:
    """How many positions a model was made for; None where it does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _no_model(name: str, error: Exception) -> ValueError:
    """The error about a model that cannot be loaded."""
    return ValueError(
        f"--model: expected a causal language model that transformers can load, received "
        f"{name!r} ({error})"
    )


def _device(name: str) -> Any:
    """Return the device that was asked for.

    Raises:
        ValueError: if PyTorch does not know it or cannot reach it.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"--device: expected a device that PyTorch can use here, received {name!r}; "
            "pass cpu, or leave the option out"
        ) from error
    if device.type == "meta":
        raise ValueError("--device: expected a device that computes, received 'meta'; pass cpu")
    return device
