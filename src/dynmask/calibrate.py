"""Calibration: a frozen model and some documents in, a MaskCard out.

DAM stage 1 (arXiv 2506.11104): average the attention maps over documents, amplify, threshold to a
true mask, and keep the diagonals and verticals that the true mask fills. Score heads for the policy
"retained" are trained in ``dynmask.retrofit``.
"""

import contextlib
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynmask.amplify import AMPLIFIERS, amplify
from dynmask.card import SCHEMA, MaskCard, describe_model
from dynmask.card_kinds import pack_bits
from dynmask.errors import bad

if TYPE_CHECKING:
    from dynmask.budgets import GatedSettings
    from dynmask.retrofit import RetainedSettings

_IMPLEMENTATION = "dynmask_capture"


@dataclass(frozen=True)
class DamSettings:
    """How DAM turns mean attention into patterns; the paper's values but for `min_support`.

    Args:
        length: L, positions of a document that are looked at; at least 2.
        tau: score from which a pair belongs to the true mask.
        mu: share of its cells that the true mask must fill for a pattern to be kept.
        lam: exponent of the amplifiers `box_cox` and `yeo_johnson`.
        amplifier: a name in `dynmask.amplify.AMPLIFIERS`.
        min_support: cells that a pattern must have to be considered. The paper takes every pattern,
            which is 1. But s sink columns fill the last s diagonals all by themselves, and a band
            of width s the last s verticals. A row's attention sums to 1, so at the paper's tau
            (mean attention above 0.0225) at most 44 keys of a row pass, and accidents of that kind
            end at 44 / mu = 55 cells; the default lies above.
        eps: mean attention is raised to this before it is amplified.
    """

    length: int = 512
    tau: float = 0.3
    mu: float = 0.8
    lam: float = 0.5
    amplifier: str = "box_cox"
    min_support: int = 64
    eps: float = 1e-8

    def __post_init__(self) -> None:
        for name in ("length", "min_support"):
            if type(getattr(self, name)) is not int:
                raise bad(f"settings.{name}", "a whole number", repr(getattr(self, name)))
        for name in ("tau", "mu", "lam", "eps"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not math.isfinite(value):
                raise bad(f"settings.{name}", "a finite number", repr(value))
        if self.length < 2:
            raise bad("settings.length", "at least 2", self.length, "The paper has 512.")
        if self.tau <= 0:
            raise bad("settings.tau", "more than 0", self.tau, "At 0 every pair is kept.")
        if not 0 < self.mu <= 1:
            raise bad("settings.mu", "a share in (0, 1]", self.mu)
        if not 0 < self.eps < 1:
            raise bad("settings.eps", "a value in (0, 1)", self.eps)
        if not isinstance(self.amplifier, str) or self.amplifier not in AMPLIFIERS:
            raise bad("settings.amplifier", f"one of {', '.join(AMPLIFIERS)}", self.amplifier)
        if not 1 <= self.min_support <= self.length:
            raise bad(
                "settings.min_support",
                f"1 to length ({self.length})",
                self.min_support,
                "No pattern has more cells than that: lower min_support or raise length.",
            )


def check_checkpoint(policy: str, path: str | os.PathLike[str] | None) -> None:
    """Look, before a model is loaded, whether the files of ``checkpoint`` can be gone on from.

    Whether they are of the same run is known with the model.

    Args:
        policy: "retained" or "gated".
        path: the file, there or not; None for none.

    Raises:
        ValueError: a file of another kind, or a damaged one.
    """
    from dynmask import budgets, encoder_training, teaching
    from dynmask.checkpoint import read_checkpoint

    if path is None:
        return
    file = Path(path)
    beside = file.with_name(f"{file.name}.encoder")
    if policy == "retained" and file.exists():
        read_checkpoint(file, teaching.CHECKPOINT, teaching.LEFT)
    if policy == "gated" and file.exists():
        budgets.read_journal(file)
    if policy == "gated" and beside.exists():
        read_checkpoint(beside, encoder_training.CHECKPOINT, encoder_training.LEFT)


def calibrate(
    model: nn.Module,
    documents: Sequence[Tensor],
    *,
    policy: str = "dam",
    settings: "DamSettings | RetainedSettings | GatedSettings | None" = None,
    seed: int = 0,
    batch: int = 1,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> MaskCard:
    """Learn a model's masks from its own attention; the model stays as it is.

    Args:
        model: any causal language model of transformers whose attention goes through its attention
            interface, on any device, in any dtype. Maps are computed in float32.
        documents: token ids, each a 1-D integer tensor of at least `settings.length`
            (`min(settings.lengths)` for "retained").
        policy: what to calibrate: "dam" averages attention maps, "retained" trains score heads,
            "gated" chooses a budget for every map by its effect; the rest of this text is about
            "dam", see `dynmask.retrofit.retrofit` and `dynmask.budgets.calibrate_gates` for the
            others.
        settings: see `DamSettings`, `RetainedSettings` and `GatedSettings`.
        seed: chooses the window of `settings.length` tokens taken from a longer document (a
            beginning-of-sequence token stays in front). The same model, documents, settings, seed
            and batch give the same card on the same device.
        batch: how many documents run at once. One map of one layer and one document is held at a
            time whatever it is, beside one sum of [h, L, L] float32 for every layer.
        checkpoint: only for "retained" and "gated": the file that an interrupted run goes on from.
        progress: show a progress bar.

    Returns:
        A card with the patterns; `density` is kept pairs over causal pairs, and `kept_mass` the
        mean over rows of the share of a row's mean attention that the row's kept keys receive
        (attention sinks that are no keys do not count), both for diagonals, verticals and self
        laid over L positions, as sequences beyond L get them. `true_density` and `true_kept_mass`
        in its header say the same of the true mask.

    Raises:
        ValueError: no documents, a document that is too short or holds unknown tokens, bad
            settings, or a model whose attention cannot be captured. Raised before the model runs,
            but for the last.

    An exception or Ctrl-C leaves the model as it was, and nothing is written anywhere.
    """
    if policy not in ("dam", "retained", "gated"):
        raise bad(
            "policy",
            "'dam', 'retained' or 'gated'",
            repr(policy),
            "Other policies need no calibration.",
        )
    from dynmask.budgets import GatedSettings, calibrate_gates
    from dynmask.retrofit import RetainedSettings, retrofit

    others: dict[str, tuple[type, Callable[..., MaskCard]]] = {
        "retained": (RetainedSettings, retrofit),
        "gated": (GatedSettings, calibrate_gates),
    }
    if policy in others:
        kind, run = others[policy]
        if settings is not None and not isinstance(settings, kind):
            raise _wrong_settings(kind.__name__, policy, settings)
        return run(model, documents, settings, seed=seed, checkpoint=checkpoint, progress=progress)
    if checkpoint is not None:
        raise bad("checkpoint", "none for policy 'dam'", repr(checkpoint), "Leave it out.")
    settings = DamSettings() if settings is None else settings
    if not isinstance(settings, DamSettings):
        raise _wrong_settings("DamSettings", policy, settings)
    if type(batch) is not int or batch < 1:
        raise bad("batch", "a whole number of at least 1", repr(batch))
    windows = _windows(model, documents, settings.length, seed)
    description = describe_model(model)
    means = mean_attention(model, windows, batch=batch, progress=progress)
    tensors, figures = _distil(means, settings)
    import dynmask

    header = {
        "schema": SCHEMA,
        "version": dynmask.__version__,
        "policy": policy,
        "settings": asdict(settings),
        "model": description,
        "data": {
            "sha256": token_digest(windows.unbind()),
            "documents": len(windows),
            "tokens": windows.numel(),
            "seed": seed,
        },
        **figures,
    }
    return MaskCard(header, tensors)


def _wrong_settings(expected: str, policy: str, received: object) -> ValueError:
    return bad("settings", f"{expected} for policy {policy!r}", type(received).__name__)


def mean_attention(
    model: nn.Module, windows: Tensor, *, batch: int = 1, progress: bool = False
) -> dict[int, Tensor]:
    """Attention averaged over the documents `windows` [n, L], float32 [h, L, L] for every layer.

    Pairs that a layer's own mask hides (the future, keys beyond a sliding window) have attention 0.
    """
    from tqdm.auto import tqdm
    from transformers import PreTrainedModel

    shape = describe_model(model)
    if not isinstance(model, PreTrainedModel):
        raise bad("model", "a transformers PreTrainedModel", type(model).__name__)
    device = next(model.get_input_embeddings().parameters()).device
    capture = _Capture()
    with (
        _capturing(model, capture),
        tqdm(total=len(windows), desc="calibrating", unit="document", disable=not progress) as bar,
    ):
        for ids in windows.split(batch):
            # The base model, without the head: nobody needs L x vocabulary logits.
            model.base_model(input_ids=ids.to(device), use_cache=False)
            bar.update(len(ids))
    expected = (shape["heads"], windows.shape[1], windows.shape[1])
    for layer in range(shape["layers"]):
        found = capture.sums.get(layer)
        if found is None or tuple(found.shape) != expected:
            raise bad(
                "model",
                f"an attention map {list(expected)} from each of its {shape['layers']} layers",
                f"{'none' if found is None else list(found.shape)} from layer {layer}",
                "Its attention must go through transformers' AttentionInterface in every layer.",
            )
        found /= len(windows)
        if not found.isfinite().all():
            raise bad(
                "model",
                "finite attention",
                f"NaN or infinity in layer {layer}",
                "Load the model in float32 or bfloat16.",
            )
    return capture.sums


def _distil(
    means: dict[int, Tensor], settings: DamSettings
) -> tuple[dict[str, Tensor], dict[str, list[list[float]]]]:
    """Tensors of the card, and density and kept mass per layer and head; empties `means`."""
    tensors: dict[str, Tensor] = {}
    figures: dict[str, list[list[float]]] = {}
    for layer in range(len(means)):
        # Taken out one by one, so that the memory of a layer is free before the next is worked on.
        mean = means.pop(layer).cpu()
        diagonals, verticals, true_mask = dam_patterns(mean, settings)
        tensors[f"layers.{layer}.diagonals"] = _padded(diagonals)
        tensors[f"layers.{layer}.verticals"] = _padded(verticals)
        tensors[f"layers.{layer}.true_mask"] = pack_bits(true_mask)
        pattern = _extended(diagonals, verticals)
        true_mask |= torch.eye(settings.length, dtype=torch.bool)
        for prefix, mask in (("", pattern), ("true_", true_mask)):
            figures.setdefault(f"{prefix}density", []).append(_density(mask))
            figures.setdefault(f"{prefix}kept_mass", []).append(_kept_mass(mean, mask))
    return tensors, figures


def dam_patterns(mean: Tensor, settings: DamSettings) -> tuple[Tensor, Tensor, Tensor]:
    """Kept diagonals bool [h, L], kept verticals bool [h, L], true mask bool [h, L, L].

    `mean` is a layer's mean attention [h, L, L]. Entry r of the diagonals stands for the pairs with
    `q - k = r`, entry c of the verticals for the pairs with `k = c`.
    """
    score = amplify(mean, settings.amplifier, settings.lam, settings.eps)
    true_mask = (score >= settings.tau).tril()
    support = torch.arange(mean.shape[-1], 0, -1)
    eligible = support >= settings.min_support
    diagonals, verticals = (g >= settings.mu for g in pattern_scores(true_mask))
    return diagonals & eligible, verticals & eligible, true_mask


def pattern_scores(true_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Gamma: the share of its cells that the mask fills, for every diagonal and every vertical.

    `true_mask` is bool [h, L, L] and causal; both results are float64 [h, L]. Diagonal r and
    vertical c have L - r and L - c cells. The kept pairs are counted by offset and by column, so no
    pattern is ever laid out.
    """
    heads, length = true_mask.shape[0], true_mask.shape[-1]
    head, row, column = true_mask.nonzero(as_tuple=True)
    cells = torch.arange(length, 0, -1, dtype=torch.float64, device=true_mask.device)

    def share(pattern: Tensor) -> Tensor:
        counts = torch.bincount(head * length + pattern, minlength=heads * length)
        return counts.view(heads, length) / cells

    return share(row - column), share(column)


class _Capture:
    """An attention function that adds each layer's map to that layer's sum."""

    def __init__(self) -> None:
        self.sums: dict[int, Tensor] = {}

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        layer: Any = module.layer_idx
        heads, rows, columns = query.shape[1], query.shape[2], key.shape[2]
        if layer not in self.sums:
            shape = (heads, rows, columns)
            self.sums[layer] = torch.zeros(shape, dtype=torch.float32, device=query.device)
        outputs = []
        masks = mask.expand(len(query), -1, -1, -1)
        for q, k, v, visible in zip(query, key, value, masks, strict=True):
            probabilities = _attention_map(q, k, visible, scaling, softcap, sinks)
            self.sums[layer] += probabilities
            grouped = probabilities.view(len(k), -1, *probabilities.shape[1:])
            out = grouped @ v.float()[:, None]
            outputs.append(out.flatten(0, 1).transpose(0, 1).to(query.dtype))
        return torch.stack(outputs)


def _attention_map(
    query: Tensor,
    key: Tensor,
    mask: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention probabilities [h, q, k] in float32 of one sequence; query [h, q, d], key [g, k, d].

    `mask` is bool [1, q, k], true where a key may be seen; every row sees at least its own.

    With sinks (a logit per head that belongs to no key) the rows sum to less than 1.
    """
    grouped = query.float().view(len(key), -1, *query.shape[1:])
    logits = (grouped @ key.float()[:, None].transpose(-1, -2)).flatten(0, 1) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, float("-inf"))
    if sinks is None:
        return logits.softmax(-1)
    sink = sinks.float().view(-1, 1, 1).expand(-1, logits.shape[1], 1)
    return torch.cat([logits, sink], -1).softmax(-1)[..., :-1]


_active: ContextVar[_Capture | None] = ContextVar("dynmask_capture", default=None)


def _captured_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The contract of transformers' attention interface; returns ([b, q, h, d], no weights)."""
    capture = _active.get()
    if capture is None:  # the name stays registered after a calibration
        raise RuntimeError(f"{_IMPLEMENTATION} serves dynmask.calibrate only; choose another.")
    if attention_mask is None:
        attention_mask = _causal_mask(query, key, sliding_window)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return capture(module, query, key, value, attention_mask, scale, softcap, s_aux), None


def _causal_mask(query: Tensor, key: Tensor, sliding_window: int | None) -> Tensor:
    queries, keys = query.shape[2], key.shape[2]
    mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    if sliding_window is not None:
        mask = mask.triu(keys - queries - sliding_window + 1)
    return mask[None, None]


def _captured_mask(*args: Any, allow_is_causal_skip: bool = True, **kwargs: Any) -> Any:
    """A full boolean mask for every layer, never None: sliding windows arrive through it."""
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*args, allow_is_causal_skip=False, **kwargs)


@contextlib.contextmanager
def _capturing(model: Any, capture: _Capture) -> Iterator[None]:
    """Route the model's attention through `capture`, in evaluation mode and without gradients."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_IMPLEMENTATION, _captured_attention)
    AttentionMaskInterface.register(_IMPLEMENTATION, _captured_mask)
    before = [(config, config._attn_implementation_internal) for config in _configs(model)]
    training = [(module, module.training) for module in model.modules()]
    token = _active.set(capture)
    try:
        model.set_attn_implementation(_IMPLEMENTATION)
        model.eval()
        with torch.no_grad():
            yield
    finally:
        _active.reset(token)
        # Written directly: set_attn_implementation validates, loads and may refuse what was there.
        for config, implementation in before:
            config._attn_implementation_internal = implementation
        for module, mode in training:
            module.training = mode


def _configs(model: nn.Module) -> list[Any]:
    """Every configuration object in the model, each once."""
    found: dict[int, Any] = {}
    pending = [module.config for module in model.modules() if hasattr(module, "config")]
    while pending:
        config: Any = pending.pop()
        if id(config) in found or not hasattr(config, "_attn_implementation_internal"):
            continue
        found[id(config)] = config
        pending += [getattr(config, name, None) for name in config.sub_configs]
    return list(found.values())


def _windows(model: nn.Module, documents: Sequence[Tensor], length: int, seed: int) -> Tensor:
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


def _padded(keep: Tensor) -> Tensor:
    """Kept indices of bool [h, n] as int32 [h, width], sorted, -1 at the end; width at least 1."""
    width = max(1, int(keep.sum(-1).max()))
    # A stable sort brings the kept ones to the front and leaves them in order.
    index = torch.argsort(~keep, dim=-1, stable=True)[:, :width]
    return index.masked_fill(~keep.gather(-1, index), -1).int()


def _extended(diagonals: Tensor, verticals: Tensor) -> Tensor:
    """The pattern bool [h, L, L] that rows beyond L get, laid over the first L positions."""
    position = torch.arange(diagonals.shape[-1])
    distance = position[:, None] - position
    kept = diagonals[:, distance.clamp(min=0)] | verticals[:, None, :] | (distance == 0)
    return kept.tril()


def _density(mask: Tensor) -> list[float]:
    length = mask.shape[-1]
    return (mask.sum((-2, -1)).double() / (length * (length + 1) / 2)).tolist()


def _kept_mass(mean: Tensor, mask: Tensor) -> list[float]:
    total = mean.sum(-1, dtype=torch.float64).clamp(min=torch.finfo(torch.float32).tiny)
    kept = (mean * mask).sum(-1, dtype=torch.float64)
    return (kept / total).mean(-1).clamp(0, 1).tolist()


def token_digest(documents: Iterable[Tensor]) -> str:
    """SHA-256 of token ids, one document after the other, each id as 8 bytes."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.cpu().long().numpy().astype("<i8").tobytes())
    return digest.hexdigest()
