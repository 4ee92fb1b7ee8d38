"""Documents that a calibration reads: token ids, checked against the model before any work."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynmask.errors import bad


def windows_of(model: nn.Module, documents: Sequence[Tensor], length: int, seed: int) -> Tensor:
    """One window of every document, int64 [n, L] on the CPU; every check happens here."""
    if len(documents) == 0:
        raise bad("documents", "at least one", "an empty set", "Pass token ids to calibrate on.")
    vocabulary, positions, bos = vocabulary_of(model)
    if positions is not None and length > positions:
        raise bad(
            "settings.length",
            f"at most the model's {positions} positions",
            length,
            f"Pass DamSettings(length={positions}) or less.",
        )
    for index, document in enumerate(documents):
        check_document(index, document, length, vocabulary)
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([_window(d.cpu().long(), length, bos, generator) for d in documents])


def vocabulary_of(model: nn.Module) -> tuple[int | None, int | None, int | None]:
    """Size of a model's vocabulary, its positions and its first token; None where not known."""
    config: Any = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    names = ("vocab_size", "max_position_embeddings", "bos_token_id")
    vocabulary, positions, bos = (getattr(config, name, None) for name in names)
    return vocabulary, positions, bos


def check_document(
    index: int, document: Any, length: int, vocabulary: int | None, setting: str = "length"
) -> None:
    """Raise ValueError unless a document is token ids, at least ``length`` of them."""
    name = f"documents[{index}]"
    if not isinstance(document, Tensor) or document.dim() != 1:
        shape = list(document.shape) if isinstance(document, Tensor) else type(document).__name__
        raise bad(name, "a 1-D tensor of token ids", shape, "Pass tokenizer(text).input_ids[0].")
    if document.is_floating_point() or document.is_complex() or document.dtype == torch.bool:
        raise bad(name, "whole numbers", document.dtype, "Convert the ids with .long().")
    if len(document) < length:
        raise bad(
            name,
            f"at least {length} tokens (settings.{setting})",
            len(document),
            f"Leave it out, join short documents, or lower settings.{setting}.",
        )
    low, high = int(document.min()), int(document.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        raise bad(
            name,
            f"token ids in [0, {vocabulary})",
            f"{low} to {high}",
            "Tokenize with the tokenizer of this model.",
        )


def _window(document: Tensor, length: int, bos: int | None, generator: torch.Generator) -> Tensor:
    slack = len(document) - length
    # Drawn also when there is no choice, so that one document does not move another's window.
    start = int(torch.randint(0, 2**62, (), generator=generator)) % (slack + 1)
    window = document[start : start + length].clone()
    if bos is not None and document[0] == bos:
        window[0] = bos
    return window


def token_digest(documents: Iterable[Tensor]) -> str:
    """SHA-256 of token ids, one document after the other, each id as 8 bytes."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.cpu().long().numpy().astype("<i8").tobytes())
    return digest.hexdigest()
