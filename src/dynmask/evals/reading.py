"""What policies read of one prompt: pictures of their masks, and which tokens the answer sees.

The result is plain data that a report keeps (``Report.reading``), so that its page can be drawn
again without the model.
"""

from __future__ import annotations

import re
import zlib
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynmask.policies import H2O

from .engine import check_policies, progress_bar
from .gallery import MaskPicture, recorder_of
from .generation import attend, greedy, is_full, needed_cache, text_config

__all__ = ["ABOVE", "BINS", "SCALE", "reading"]

PIXELS = 128  # along each axis of a picture
MAPS = 6  # attention maps (layer, head) that are drawn, the same for every policy
BINS = 480  # of the strip of keys
SCALE = 254  # a pixel or bin of this value is read in full
ABOVE = 255  # a pixel above the diagonal, where nothing can be read
RANGES = 6  # ranges of much read tokens that are listed
LISTED = 0.5  # a listed token is read by at least this share of the maps, where any is
SHOWN = 12_000  # characters of the prompt that are kept, half from either end
WORDS = 90  # characters of a listed range


def reading(
    model: torch.nn.Module,
    tokenizer: Any,
    policies: Mapping[str, Any],
    prompt: str,
    *,
    source: str = "own prompt",
    answers: Sequence[str] = (),
    measure_rows: int = 32,
    impl: str = "auto",
    progress: bool = False,
) -> dict[str, Any]:
    """Run a prefill and one decoded token under every policy and say what was read.

    Policies that read everything have nothing to draw and are left out.

    Args:
        model: a Hugging Face causal language model, in eval mode on its device.
        tokenizer: its tokenizer.
        policies: a name for the page -> a policy, or None for the model's own attention.
        prompt: the text that is read, with the tokenizer's own special tokens.
        source: where the prompt comes from, in a few words.
        answers: texts in the prompt whose tokens are to be marked.
        measure_rows: query rows per layer whose attention mass is measured; 0: none.
        impl: the attention implementation.
        progress: show a progress bar on stderr.

    Returns:
        JSON-serialisable: ``source``, ``tokens``, ``prompt`` (its ends, where it is long),
        ``answers`` (``text``, ``start`` and ``end`` of tokens, for the first answer that stands
        in the prompt), and ``policies``, each with ``policy``, ``density``, ``kept_mass``,
        ``maps`` (``layer``, ``head``, ``density``, ``side``, ``pixels``), ``prefill`` and
        ``decode`` (``share`` of pairs read, ``strip``, ``answer``: the share of maps that read
        the answer's tokens), ``keeps`` (whether a decoded token reads what the prompt chose), and
        ``ranges`` of the tokens that most maps read. Pixels and strips are base64 of zlib of
        bytes from 0 to ``SCALE``, ``ABOVE`` where no pair is causal.

    Raises:
        ValueError: if the prompt has fewer than two tokens, or a policy does not fit.
    """
    chosen = {name: policy for name, policy in policies.items() if not is_full(policy)}
    check_policies(model, chosen)
    ids, places = _encode(tokenizer, prompt, answers)
    if len(ids) < 2:
        raise ValueError(
            f"prompt: expected at least 2 tokens, received {len(ids)}; pass a longer text"
        )
    device = next(model.parameters()).device
    tokens = torch.tensor([ids], device=device)
    found = {}
    with progress_bar(len(chosen), "masks of the prompt", progress) as bar:
        for name, policy in chosen.items():
            bar.set_postfix_str(name)
            found[name] = _record(model, tokens, policy, measure_rows, impl)
            bar.update()
    maps = _maps(found.values())
    return {
        "source": source,
        "tokens": len(ids),
        "prompt": _ends(prompt),
        "answers": places,
        "policies": [
            _policy(name, record, maps, ids, places, tokenizer) for name, record in found.items()
        ],
    }


class _Record(NamedTuple):
    """What one policy did: a picture of each layer, rows of one decoded token, and the summary.

    Everything has as many heads as the model has query heads.
    """

    pictures: list[MaskPicture]
    decoded: list[Tensor]
    summary: dict[str, Any]
    keeps: bool


def _record(
    model: torch.nn.Module, ids: Tensor, policy: Any, measure_rows: int, impl: str
) -> _Record:
    recorder = recorder_of(policy, PIXELS)
    # under "keep" a decoded token reads what the prompt chose: there is no row of its own
    keeps = getattr(policy, "decode", None) == "keep"
    with attend(model, recorder, impl, measure=True, measure_rows=measure_rows) as run:
        greedy(model, ids, 1 if keeps or isinstance(policy, H2O) else 2)
        summary = run.summary()["prefill"]
    rows = _held(model, ids, policy, impl) if isinstance(policy, H2O) else recorder.decoded
    heads = text_config(model).num_attention_heads
    pictures = [
        replace(
            picture,
            share=_of_all(picture.share, heads),
            density=_of_all(picture.density, heads),
            last=None if picture.last is None else _of_all(picture.last, heads),
        )
        for _, picture in sorted(recorder.pictures.items())
    ]
    decoded = [_of_all(row, heads) for _, row in sorted(rows.items())]
    return _Record(pictures, decoded, summary, keeps)


def _held(model: torch.nn.Module, ids: Tensor, policy: H2O, impl: str) -> dict[int, Tensor]:
    """What the first decoded token reads under H2O: what each layer's cache holds then."""
    from dynmask.integrations.heavy_cache import HeavyHitterLayer

    with attend(model, policy, impl) as run:
        cache = needed_cache(run)
        greedy(model, ids, 2, cache=cache)
    rows = {}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, HeavyHitterLayer):
            assert layer.store is not None
            held = layer.store.positions[0].long().cpu()
            row = torch.zeros(len(held), ids.shape[1] + 1, dtype=torch.bool)
            rows[index] = row.scatter(-1, held, True)
    return rows


def _of_all(x: Tensor, heads: int) -> Tensor:
    """Give every query head what its kv head, or all heads together, have along dimension 0."""
    return x.repeat_interleave(heads // x.shape[0], 0)


def _policy(
    name: str,
    record: _Record,
    maps: list[tuple[int, int]],
    ids: list[int],
    places: list[dict[str, Any]],
    tokenizer: Any,
) -> dict[str, Any]:
    """Return what one policy read, as data."""
    layers = {picture.layer: picture for picture in record.pictures}
    prefill = _share([picture.last for picture in record.pictures if picture.last is not None])
    own = _share([row[:, : len(ids)] for row in record.decoded])
    return {
        "policy": name,
        "density": record.summary["density"],
        "kept_mass": record.summary["kept_mass"],
        "maps": [_map(layers[layer], head) for layer, head in maps if layer in layers],
        "prefill": _strip(prefill, places),
        # A policy of prefills alone is not asked while decoding: everything is read then.
        "decode": _strip(own, places),
        "keeps": record.keeps,
        "ranges": [] if prefill is None else _ranges(prefill, ids, tokenizer),
    }


def _map(picture: MaskPicture, head: int) -> dict[str, Any]:
    share = picture.share[head]
    levels = (share * SCALE).round().nan_to_num(ABOVE)
    # What is read is never drawn as if it were not, however little it is.
    levels = torch.where((share > 0) & (levels < 1), 1.0, levels)
    return {
        "layer": picture.layer,
        "head": head,
        "density": float(picture.density[head]),
        "side": list(share.shape),
        "pixels": _packed(levels),
    }


def _maps(found: Iterable[_Record]) -> list[tuple[int, int]]:
    """Return the maps that are drawn: from the sparsest to the densest, mean over policies."""
    total: dict[tuple[int, int], list[float]] = {}
    for picture in (picture for record in found for picture in record.pictures):
        for head, value in enumerate(picture.density.tolist()):
            total.setdefault((picture.layer, head), []).append(round(value, 6))
    order = sorted(total, key=lambda at: (sum(total[at]) / len(total[at]), at))
    count = min(MAPS, len(order))
    return [order[i * (len(order) - 1) // max(count - 1, 1)] for i in range(count)]


def _share(rows: Sequence[Tensor]) -> Tensor | None:
    """Return the share of all maps that read each key: float [keys], or None without a row."""
    return torch.cat(list(rows)).float().mean(0) if rows else None


def _strip(share: Tensor | None, places: list[dict[str, Any]]) -> dict[str, Any] | None:
    if share is None:
        return None
    bins = min(BINS, len(share))
    edges = [i * len(share) // bins for i in range(bins + 1)]
    means = [float(share[a:b].mean()) for a, b in pairwise(edges)]
    levels = [max(round(mean * SCALE), int(mean > 0)) for mean in means]
    at = [float(share[place["start"] : place["end"]].mean()) for place in places]
    return {
        "share": float(share.mean()),
        "strip": _packed(torch.tensor(levels)),
        "answer": max(at, default=None),
    }


def _ranges(share: Tensor, ids: list[int], tokenizer: Any) -> list[dict[str, Any]]:
    """Return the longest ranges of tokens that most maps read, in the order of the text."""
    least = LISTED if bool((share >= LISTED).any()) else float(share.max())
    if least == 0:
        return []
    inside = torch.cat([torch.zeros(1), (share >= least).float(), torch.zeros(1)])
    change = inside.diff()
    starts, ends = (change > 0).nonzero()[:, 0].tolist(), (change < 0).nonzero()[:, 0].tolist()
    longest = sorted(zip(starts, ends, strict=True), key=lambda r: (r[0] - r[1], r[0]))[:RANGES]
    return [
        {
            "start": start,
            "end": end,
            "share": float(share[start:end].mean()),
            "text": _ends(tokenizer.decode(ids[start:end]), WORDS),
        }
        for start, end in sorted(longest)
    ]


def _encode(
    tokenizer: Any, prompt: str, answers: Sequence[str]
) -> tuple[list[int], list[dict[str, Any]]]:
    """Return the token ids, and the places of the first answer that stands in the prompt."""
    marked = getattr(tokenizer, "is_fast", False)
    extra = {"return_offsets_mapping": True} if marked else {}
    encoded = tokenizer(prompt, **extra)
    ids = list(encoded["input_ids"])
    if not marked:
        return ids, []
    for answer in answers:
        hits = re.finditer(rf"(?<!\w){re.escape(answer)}(?!\w)", prompt) if answer else ()
        spans = [(hit.start(), hit.end()) for hit in hits][:4]
        places = [_tokens_of(encoded["offset_mapping"], *span) for span in spans]
        found = [{"text": answer, "start": a, "end": b} for a, b in places if b > a]
        if found:
            return ids, found
    return ids, []


def _tokens_of(offsets: Sequence[tuple[int, int]], first: int, last: int) -> tuple[int, int]:
    """Return the range of the tokens that touch characters ``first`` to ``last``."""
    inside = [i for i, (a, b) in enumerate(offsets) if a < last and b > first]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def _ends(text: str, most: int = SHOWN) -> str:
    """Return a text, or its two ends where it has more than ``most`` characters."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


def _packed(levels: Tensor) -> str:
    return b64encode(zlib.compress(levels.to(torch.uint8).numpy().tobytes(), 9)).decode("ascii")
