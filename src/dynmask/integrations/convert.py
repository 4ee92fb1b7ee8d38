"""Dynamic mask attention inside a transformers model, for continued training.

The model keeps its projections, norms and rotary embedding; each attention module gains a score
module, and its attention reads the keys that score highest. Everything is in the modules and the
configuration, so that copies, checkpoints and other models are not confused.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ..errors import bad
from ..masks import LifetimeMask
from ..masks.base import check_whole
from ..nn import ValueScore
from ..policies import Causal, Layer
from ..policies.base import AnyModel, own_heads
from ..retention import (
    Retention,
    check_assigned,
    check_weight,
    keep_retention_loss,
    retention_loss_of,
)
from ..scores import Form
from .adapter import Adapter, Site
from .cache import BoundedLayer
from .calls import drop_hook, note_call
from .checks import CONVERTED, attention_modules, check_forward, check_model, configs
from .checks import decoder_config as decoder_config_of
from .masking import mask_of
from .shard import shard_of
from .share import Share

SCORE = "dynmask_score"
"""Name of the score module in an attention module."""

SETTINGS = "dynmask"
"""Name of the settings in the model's configuration."""

LAYERS = "layers"
"""Name, in the settings, of what single layers were given since they were converted."""


@dataclass(frozen=True)
class Lesson:
    """How a layer's retention loss is computed, see :func:`dynmask.nn.retention_loss_of`.

    Args:
        weight: of the loss; 0 computes none.
        rows: query rows drawn from each sequence.
        after: positions between a key and the rows that judge it, at least.
    """

    weight: float
    rows: int
    after: int

    def __post_init__(self) -> None:
        check_weight(self.weight)
        check_whole("retention_rows", self.rows, 1)
        check_whole("retention_after", self.after, 0)


class LayerScore(ValueScore):
    """The score of one converted layer, with what else its attention needs to know.

    Attributes:
        lesson: the retention loss.
    """

    def __init__(
        self,
        kv_heads: int,
        head_dim: int,
        form: Form,
        retention: Retention,
        lesson: Lesson,
        settings: dict[str, Any],
        index: int,
    ) -> None:
        super().__init__(kv_heads, head_dim, form)
        self.lesson = lesson
        self._retention, self._settings, self._index = retention, settings, index

    @property
    def retention(self) -> Retention:
        """What a query reads. Assign another to change the width while training.

        The model's configuration takes note of it, so that it is saved.
        """
        return self._retention

    @retention.setter
    def retention(self, retention: Retention) -> None:
        check_assigned(retention, len(self.A))
        own = self._settings.setdefault(LAYERS, {})
        own[str(self._index)] = json.loads(json.dumps(asdict(retention)))
        self._retention = retention


class Dma(AnyModel):
    """Dynamic Mask Attention (arXiv 2508.02124, section 3) by one layer's score module.

    Args:
        score: the module.
    """

    name: ClassVar[str] = "dma"
    causal: ClassVar[bool] = True
    phase: ClassVar[Literal["both", "prefill"]] = "both"
    trains: ClassVar[bool] = True

    def __init__(self, score: LayerScore, share: Share | None = None) -> None:
        self.score, self.share = score, share

    def retention(self, layer: int) -> Retention:
        """What a query reads."""
        retention, share = self.score.retention, self.share
        if share is None or isinstance(retention.width, int):
            return retention
        return replace(retention, width=own_heads(retention.width, share.rank, share.ranks))

    def scores(self, key: Tensor | None, value: Tensor, layer: Layer) -> Tensor:
        """Score of each key: [b, g, n]; from the values of all kv heads, whoever holds them."""
        share, heads = self.share, len(self.score.A)
        ranks = 1 if share is None else share.ranks
        if value.shape[1] * ranks != heads:
            raise bad(
                "attention", f"{heads // ranks} kv heads on this process", value.shape[1],
                "Where processes share heads (DeepSpeed Ulysses), call "
                "dynmask.distributed.share_heads; after tp_plan='auto', convert again.",
            )  # fmt: skip
        if share is None:
            return self.score(key, value)
        learning = torch.is_grad_enabled() and any(p.requires_grad for p in self.score.parameters())
        if learning and not share.trains:
            raise bad(
                "model", "torch.no_grad(), or scores without gradients, under tp_plan",
                "scores that train", "Train with DeepSpeed Ulysses, which sums their gradients.",
            )  # fmt: skip
        return share.own(self.score(None, share.all(value)))

    def bias(self, scores: Tensor, layer: Layer) -> Tensor:
        """What is added to the logits: [b, g, n]."""
        return self.score.bias(scores)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> LifetimeMask:
        """The lifetimes of the keys."""
        scores = self.scores(key, value, layer)
        return self.retention(layer.index).mask(scores, query.shape[2])


class Window(Causal):
    """A layer with a sliding window of its own, which stays as it is."""

    def retention(self, layer: int) -> Retention:
        """What a layer with choices has: its own window, known in the call, goes before."""
        return Retention(2, 0, 0)

    def scores(self, key: Tensor, value: Tensor, layer: Layer) -> Tensor:
        """All keys alike: float32 [b, g, n]."""
        return torch.zeros(key.shape[:3], device=key.device)

    def bias(self, scores: Tensor, layer: Layer) -> None:
        """Nothing is added to the logits."""
        return None


WINDOW = Window()


class ConvertedAdapter(Adapter):
    """The attention function of all converted models."""

    def _policy(self, module: nn.Module) -> Any:
        score = getattr(module, SCORE, False)
        if score is None:
            return WINDOW
        if not isinstance(score, LayerScore):
            raise ValueError(
                f"model: expected layers that were converted, received {type(module).__name__} "
                "without a score module, of a model with the config object of a converted one; "
                "give every model a config of its own (copy.deepcopy(config)), or load a "
                "converted one with dynmask.load_converted"
            )
        return Dma(score, _SHARES.get(score))

    def _teach(self, site: Site, groups: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Compute the retention loss, a mean over positions, and keep it to be collected."""
        score = getattr(site.policy, "score", None)
        if score is None or not score.training or not score.lesson.weight:
            return
        if site.where.has_past or not any(p.requires_grad for p in score.parameters()):
            return
        lesson: Lesson = score.lesson
        loss, positions = score.A.new_zeros(()), 0
        for query, key, value in groups:
            # its gradient ends at the score: values are not to be bent to be predictable
            scores = site.policy.scores(None, value.detach(), Layer(site.index))
            part = retention_loss_of(
                query,
                key,
                scores,
                rows=lesson.rows,
                after=lesson.after,
                scale=site.scale,
                protect=score.retention,
            )
            size = scores[:, 0].numel()
            loss, positions = loss + size * part, positions + size
        keep_retention_loss(score, lesson.weight * loss / positions)


_ADAPTER = ConvertedAdapter("auto")


@torch.compiler.disable
def _watch(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of the model and its parts."""
    _ADAPTER._placements.clear()
    check_forward(module, args, kwargs, (BoundedLayer,))


# With the module: a pickled model finds it in a new process, where nothing was converted.
AttentionInterface.register(CONVERTED, torch.compiler.disable(_ADAPTER._attend))
AttentionMaskInterface.register(CONVERTED, mask_of)


_SHARES: weakref.WeakKeyDictionary[LayerScore, Share] = weakref.WeakKeyDictionary()
"""Scores of layers whose heads are shared; aside, for process groups cannot be copied or saved."""


def share_scores(model: nn.Module, share: Share) -> None:
    """Let the scores of a converted model read the values of all processes' heads."""
    for module in model.modules():
        if isinstance(module, LayerScore):
            _SHARES[module] = share


def _share_of(model: PreTrainedModel) -> Share | None:
    """How ``tp_plan="auto"`` shares the heads of a model; None where it does not."""
    rank, ranks = shard_of(model)
    if ranks == 1:
        return None
    mesh: Any = model._device_mesh
    group = mesh.get_group("tp" if "tp" in (mesh.mesh_dim_names or ()) else None)
    return Share(rank, ranks, group, trains=False)


def is_converted(model: nn.Module) -> bool:
    """Whether :func:`convert` has changed the model."""
    return any(isinstance(m, LayerScore) for m in model.modules())


def convert(
    model: PreTrainedModel,
    *,
    width: int | Sequence[int],
    window: int = 128,
    sinks: int = 4,
    form: Form = "exp",
    retention_weight: float = 0.05,
    retention_rows: int = 48,
    retention_after: int = 128,
) -> PreTrainedModel:
    """Turn the attention of a transformers model into dynamic mask attention, in place.

    Dynamic Mask Attention (arXiv 2508.02124, section 3): every attention module gains a
    ``dynmask_score`` (:class:`dynmask.nn.ValueScore`, float32), whose parameters train with the
    others. Layers with a sliding window of their own stay as they are. In training mode each
    layer keeps its retention loss; add ``dynmask.nn.collect_retention_loss(model)`` to the loss
    of every step. Gradient checkpointing must be the non-reentrant one.

    The settings are in ``model.config.dynmask``: ``save_pretrained`` writes them and the scores,
    :func:`load_converted` reads both. ``BoundedCache(model)`` generates in O(width) memory.
    With ``exp`` and ``linear`` all scores tie at first, and the latest keys win. Attention sinks
    of the model (gpt-oss) have no bias: with ``exp``, which begins at a bias of 1 for every key,
    they begin weaker than they were; ``linear`` begins at 0.

    A model that was loaded with ``tp_plan="auto"`` is converted on every rank, to be used as it
    is: its scores do not train. Under DeepSpeed Ulysses they do, see
    :func:`dynmask.distributed.share_heads`.

    Args:
        model: a decoder-only model whose attention goes through transformers'
            AttentionInterface, with queries, keys and values of one head dim.
        width: keys that a query reads at most; a sequence gives each kv head its own.
        window: newest keys that are always read, counted in the width.
        sinks: first keys that are always read, counted in the width.
        form: of the score's bias, see :class:`dynmask.nn.ValueScore`.
        retention_weight: of the retention loss; 0 computes none.
        retention_rows: query rows that the loss draws from each sequence.
        retention_after: positions between a key and the rows that judge it, at least.

    Returns:
        The model itself.

    Raises:
        ValueError: the model or a setting does not fit; nothing is changed then.
    """
    check_model(model)
    retention = Retention(width, window, sinks)  # type: ignore[arg-type]
    if retention.most == sinks + window:
        raise ValueError(
            f"width: expected more than sinks + window = {sinks + window}, received {width}; "
            "without room for others no score matters: use the Streaming policy"
        )
    lesson = Lesson(retention_weight, retention_rows, retention_after)
    config = decoder_config_of(model)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    retention.check(heads)
    settings: dict[str, Any] = {
        "width": width if isinstance(width, int) else list(width),
        "window": window,
        "sinks": sinks,
        "form": form,
        "retention_weight": float(lesson.weight),
        "retention_rows": lesson.rows,
        "retention_after": lesson.after,
    }
    share = _share_of(model)
    made: list[tuple[nn.Module, LayerScore | None]] = []
    for module in attention_modules(model):
        dim = _value_dim(module, config, heads)
        score = None
        if not _slides(module, config):
            index = int(module.layer_idx)  # type: ignore[arg-type]
            score = LayerScore(heads, dim, form, retention, lesson, settings, index)
            device = next(module.parameters()).device
            score = score.to(device, torch.float32).train(module.training)
        made.append((module, score))
    if all(score is None for _, score in made):
        raise ValueError(
            f"model: expected a layer of full attention, received {type(model).__name__} with a "
            "sliding window in every one; set config.sliding_window = None before building it"
        )
    _attach(model, made)
    setattr(model.config, SETTINGS, settings)
    if share is not None:
        share_scores(model, share)
        for _, score in made:
            for parameter in () if score is None else score.parameters():
                source = dist.get_global_rank(share.group, 0) if share.group else 0
                dist.broadcast(parameter.detach(), source, share.group)  # drawn on each rank
    return model


def _attach(model: PreTrainedModel, made: list[tuple[nn.Module, LayerScore | None]]) -> None:
    note: Any = note_call
    watch: Any = _watch
    for module, score in made:
        module.dynmask_before = module.config._attn_implementation  # type: ignore[union-attr, assignment]
        setattr(module, SCORE, score)
        module.register_forward_pre_hook(note, with_kwargs=True)
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.register_forward_pre_hook(watch, with_kwargs=True)
    for config in configs(model):
        config._attn_implementation_internal = CONVERTED


def revert(model: PreTrainedModel) -> PreTrainedModel:
    """Take dynamic mask attention off a converted model, in place; its scores are lost.

    Returns:
        The model itself, with its other weights as they are.

    Raises:
        ValueError: a model that was not converted.
    """
    if not isinstance(model, nn.Module) or not is_converted(model):
        raise ValueError(
            f"model: expected one that dynmask.convert changed, received {type(model).__name__} "
            "without scores"
        )
    modules = attention_modules(model)
    before = modules[0].dynmask_before
    for config in configs(model):
        config._attn_implementation_internal = before
    for module in modules:
        module.config._attn_implementation_internal = module.dynmask_before  # type: ignore[union-attr]
        delattr(module, SCORE)
        del module.dynmask_before
        drop_hook(module, note_call)
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            drop_hook(part, _watch)
    delattr(model.config, SETTINGS)
    return model


def load_converted(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a converted model that ``save_pretrained`` wrote.

    Args:
        path: the folder.
        **kwargs: of ``from_pretrained``, for example ``dtype`` and ``device_map``.

    Returns:
        The converted model, in evaluation mode, its scores in float32.

    Raises:
        ValueError: a folder without settings or without the scores of every layer, or loading
            information that is asked for.
    """
    path = Path(path)
    if kwargs.get("output_loading_info"):
        raise bad(
            "output_loading_info", "False, for the model alone is returned", True, "Leave it out."
        )
    settings = settings_of(path)
    config = kwargs.get("config")
    if config is None:
        code = {name: kwargs[name] for name in ("trust_remote_code",) if name in kwargs}
        config = transformers.AutoConfig.from_pretrained(path, **code)
    names = getattr(config, "architectures", None) or ["AutoModelForCausalLM"]
    kind = getattr(transformers, names[0], transformers.AutoModelForCausalLM)
    model = _load_quietly(kind, path, kwargs)
    if hasattr(model.config, SETTINGS):
        delattr(model.config, SETTINGS)
    changed = settings.pop(LAYERS, {})
    convert(model, **settings)
    for module in attention_modules(model):
        own = changed.get(str(module.layer_idx))
        if own is not None:
            getattr(module, SCORE).retention = Retention(**own)
    saved = saved_scores(path)
    wanted = {n for n in model.state_dict() if f".{SCORE}." in n}
    if saved.keys() != wanted:
        missing, other = sorted(wanted - saved.keys())[:1], sorted(saved.keys() - wanted)[:1]
        raise ValueError(
            f"path: expected {len(wanted)} score tensors, received {len(saved)} "
            f"(missing {missing}, unknown {other}); save the whole model with save_pretrained"
        )
    model.load_state_dict(saved, strict=False)
    return model.eval()


def _load_quietly(kind: Any, path: Path, kwargs: dict[str, Any]) -> PreTrainedModel:
    """A model without its scores; transformers is told that others read them.

    It would report them as unexpected tensors. What it has to say of any other tensor, it says.
    """
    if not issubclass(kind, PreTrainedModel):  # code from the hub: its class is not known yet
        return kind.from_pretrained(path, **kwargs)
    ignored = {*(kind._keys_to_ignore_on_load_unexpected or ()), rf"\.{SCORE}\."}
    # a class of its own, so that no model that is loaded meanwhile ignores them too
    told = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "_keys_to_ignore_on_load_unexpected": ignored,
    }
    model = type(kind.__name__, (kind,), told).from_pretrained(path, **kwargs)
    model.__class__ = kind  # type: ignore[misc]
    return model


def settings_of(path: Path) -> dict[str, Any]:
    """What a converted model in a folder was converted with; ValueError where it was not."""
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(
            f"path: expected a folder with config.json, received {path}; load_converted reads what "
            "save_pretrained of a converted model wrote"
        )
    settings = json.loads(file.read_text(encoding="utf-8")).get(SETTINGS)
    if not isinstance(settings, dict):
        raise ValueError(
            f"path: expected {SETTINGS!r} in {file}, received a model that was not converted; load "
            "it with from_pretrained, then dynmask.convert"
        )
    return settings


def saved_scores(path: Path) -> dict[str, Tensor]:
    """The score tensors of a folder's safetensors files."""
    from safetensors import safe_open

    out = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as tensors:
            out |= {n: tensors.get_tensor(n) for n in tensors.keys() if f".{SCORE}." in n}  # noqa: SIM118
    return out


def _slides(module: nn.Module, config: Any) -> bool:
    """Whether a layer has a sliding window of its own."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return "sliding" in kinds[module.layer_idx]  # type: ignore[index]
    own = getattr(module, "sliding_window", None)
    return (getattr(config, "sliding_window", None) if own is None else own) is not None


def _value_dim(module: nn.Module, config: Any, heads: int) -> int:
    """Dimensions of a value head; ValueError for attention that is not of the usual shape."""
    dim = getattr(module, "head_dim", None) or getattr(config, "head_dim", None)
    value = getattr(module, "v_proj", None)
    size = getattr(value, "out_features", None)
    if dim is None or getattr(config, "kv_lora_rank", None) or size not in (None, heads * dim):
        raise ValueError(
            f"model: expected self attention with {heads} kv heads of one head dim, received "
            f"{type(module).__name__} with head_dim {dim} and {size} value channels; build it from "
            "dynmask.nn.DynamicMaskAttention instead"
        )
    return int(dim)


__all__ = ["LayerScore", "convert", "is_converted", "load_converted", "revert"]
