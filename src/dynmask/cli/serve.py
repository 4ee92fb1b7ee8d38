"""``dynmask serve``: start vLLM's server with a card."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import supervise
from .common import POLICY_HELP, count, say

__all__ = ["DESCRIPTION", "EPILOG", "HELP", "add_arguments", "command_of", "run"]

HELP = "answer over HTTP with a sparse mask, by vLLM's OpenAI-compatible server"
DESCRIPTION = """\
Start vLLM's server under a card or a policy. The card is checked against the model
before anything is loaded; then the command is printed and runs until it is stopped.
"""
EPILOG = """\
examples:
  dynmask serve MODEL --card my-card
  dynmask serve MODEL --card my-card --port 8001 --max-model-len 131072
  dynmask serve MODEL --policy streaming:sinks=4,window=4096 --tensor-parallel-size 2
  dynmask serve MODEL --card my-card --restart 3
  dynmask serve CONVERTED --policy dma
  dynmask serve MODEL --card my-card --print-only

Options that are not listed here are vLLM's: they go to it as they are, after MODEL. So
does whatever follows --, the way to those that have the name of one of these.

A server that ends by itself is an error: exit code 1, or --restart.

A policy whose choice depends on where a prompt is cut (gated, pooled, vertical_slash,
...) is served with whole prompts and without cached prefixes, so that an answer does not
depend on what else is served; --chunked leaves both to vLLM. docs/serving.md tells it all.
"""

OWN_SCORES = "dma"
"""The policy of a model that ``dynmask.convert`` changed, by its own scores."""

SECRETS = ("--api-key", "--hf-token")
"""vLLM's options whose values are nobody else's business."""

DENSE_UP_TO = 16384
"""Tokens up to which a gated card's prompts are read whole by default: choosing among so few costs
a GPU more than it saves (``docs/generator.md``)."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    command.add_argument(
        "model", metavar="MODEL", help="folder or Hugging Face hub name of a causal language model"
    )
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--card", metavar="CARD", help="folder or hub name of a mask card")
    what.add_argument(
        "--policy",
        metavar="POLICY",
        help=f"{POLICY_HELP}; dma is the policy of a model that dynmask.convert changed",
    )
    command.add_argument(
        "--dense-up-to",
        type=int,
        metavar="TOKENS",
        help=f"gated cards: inputs of so many tokens are read whole ({DENSE_UP_TO})",
    )
    command.add_argument(
        "--phase",
        choices=("both", "prefill"),
        help="what is chosen for: whatever the policy chooses for (both; gated: prompts, unless it "
        "says decode=select), or prompts alone, so that decoded tokens read every key by vLLM's "
        "own attention (both, unless DYNMASK_PHASE says otherwise)",
    )
    command.add_argument("--host", help="address to listen at (vLLM's default: all of them)")
    command.add_argument("--port", type=int, help="port to listen at (vLLM's default: 8000)")
    command.add_argument(
        "--chunked",
        action="store_true",
        help="let vLLM cut prompts and share prefixes, whatever the policy",
    )
    command.add_argument(
        "--restart",
        type=count,
        default=0,
        metavar="N",
        help="start a server that ended by itself again, up to N times (0)",
    )
    command.add_argument(
        "--print-only", action="store_true", help="check, print the command and stop"
    )
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")


def run(arguments: argparse.Namespace) -> int:
    """Check, print, and become the process that keeps the server."""
    passed_on = list(getattr(arguments, "passed_on", ()))
    if find_spec("vllm") is None and not arguments.print_only:
        raise RuntimeError("dynmask serve needs vLLM: pip install 'dynmask[vllm]'")
    policy = _policy(arguments)
    _check(arguments.model, policy)
    gpu = _has_gpu()
    command = command_of(arguments, policy, passed_on, gpu)
    own = {"DYNMASK_POLICY": policy}
    if arguments.phase is not None:
        own["DYNMASK_PHASE"] = arguments.phase
    assignments = [f"{name}={shlex.quote(value)}" for name, value in own.items()]
    line = " ".join([*assignments, shlex.join(command)])
    if arguments.print_only:
        if not gpu:
            say("[printed where there is no GPU: on one, add --attention-backend CUSTOM]")
        print(line)
        return 0
    say(f"running: {' '.join([*assignments, shlex.join(without_secrets(command))])}")
    sys.stdout.flush()
    left = {k: v for k, v in os.environ.items() if k != "DYNMASK_CARD"}
    kept = supervise.command_of(command, arguments.restart)
    os.execvpe(kept[0], kept, left | own)


def without_secrets(command: Sequence[str]) -> list[str]:
    """A command as a log may have it: what follows an option of :data:`SECRETS` is stars."""
    shown, hidden = [], False
    for word in command:
        name, equals, _ = word.partition("=")
        if word.startswith("-"):
            hidden = name in SECRETS
            shown.append(f"{name}=***" if hidden and equals else word)
        else:
            shown.append("***" if hidden else word)
    return shown


def command_of(
    arguments: argparse.Namespace, policy: str, passed_on: Sequence[str], gpu: bool
) -> list[str]:
    """The command that serves.

    Args:
        arguments: of this command.
        policy: its text form.
        passed_on: what goes to vLLM as it is.
        gpu: whether there is one; on a CPU vLLM takes the backend by itself.
    """
    from dynmask.policies import parse

    # `vllm serve` of this very Python, wherever its scripts are
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", arguments.model]
    if gpu:
        command += ["--attention-backend", "CUSTOM"]
    for name in ("host", "port"):
        if getattr(arguments, name) is not None:
            command += [f"--{name}", str(getattr(arguments, name))]
    if policy == OWN_SCORES:
        return [*command, "--load-format", "dynmask", *passed_on]
    if not parse(policy).causal and not arguments.chunked:
        command += ["--no-enable-chunked-prefill", "--no-enable-prefix-caching"]
    return [*command, *passed_on]


def _policy(arguments: argparse.Namespace) -> str:
    """The text form of the policy that is asked for."""
    if arguments.card is None:
        if arguments.dense_up_to is not None:
            raise ValueError(
                "--dense-up-to: expected it beside --card, received it beside --policy; write "
                "dense_up_to=... into the policy"
            )
        return arguments.policy
    from dynmask.integrations.vllm.settings import policy_of_card

    card = arguments.card
    if Path(card).exists():  # vLLM's processes may run elsewhere
        card = str(Path(card).resolve())
    spec = policy_of_card(card)
    gated = spec.startswith("gated:")
    if arguments.dense_up_to is not None and not gated:
        raise ValueError(
            f"--dense-up-to: expected it for a gated card, received one of "
            f"{spec.partition(':')[0]}; leave it out"
        )
    dense = DENSE_UP_TO if arguments.dense_up_to is None else arguments.dense_up_to
    return f"{spec},dense_up_to={dense}" if gated and dense else spec


def _check(model: str, spec: str) -> None:
    """Raise ValueError where a policy does not fit a model, as far as its files tell."""
    from dynmask.integrations.checkpoint import checkpoint_folder, fingerprint_of_files
    from dynmask.integrations.vllm.checks import check_policy
    from dynmask.policies import parse

    config = _config(model)
    if spec == OWN_SCORES:
        _check_converted(model, config)
        return
    policy = parse(spec)
    card = getattr(policy, "card", None)
    check_policy(policy, config, None if card is None else card.header["model"])
    if card is None:
        return
    folder = checkpoint_folder(model)
    found = None if folder is None else fingerprint_of_files(folder)
    if found is None:
        say("[the model's files do not tell yet whether the card is for these weights]")
    elif found != card.header["model"]["fingerprint"]:
        raise ValueError(
            f"mask card: expected the weights that it was calibrated on, received those of {model}"
            ". Masks fit one set of weights: calibrate this model with dynmask calibrate."
        )


def _check_converted(model: str, config: Any) -> None:
    """Raise ValueError unless a model was converted and its scores are here."""
    from dynmask.integrations.vllm.checks import head_dim_of, shape_of
    from dynmask.integrations.vllm.converted import OwnScores

    OwnScores.of_folder(model, shape_of(config)[2], head_dim_of(config))


def _config(model: str) -> Any:
    """The text configuration of a model; ValueError where there is none."""
    try:
        import transformers
    except ImportError as error:
        raise RuntimeError(
            "this command needs transformers: pip install 'dynmask[transformers]'"
        ) from error
    if not Path(model).exists() and (model.count("/") != 1 or model.startswith((".", "/", "~"))):
        raise ValueError(
            f"MODEL: expected a folder or a hub name such as owner/name, received {model!r}, "
            "which is not here; check the path"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"MODEL: expected a model that transformers knows, received {model!r} ({error})"
        ) from error
    return config.get_text_config(decoder=True)


def _has_gpu() -> bool:
    """Whether there is an NVIDIA GPU."""
    import torch

    return torch.cuda.is_available()
