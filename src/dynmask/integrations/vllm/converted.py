"""Models that ``dynmask.convert`` changed: their scores, read from their own files.

vLLM builds the model that it knows by the architecture's name, without score modules. The scores
are loaded here, and a load format of our own (``--load-format dynmask``) leaves them out of what
vLLM loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...errors import bad
from ...masks import LifetimeMask
from ...policies import Layer
from ...policies.base import AnyModel
from ...retention import Retention
from ..convert import LAYERS, SCORE, WINDOW, Dma, LayerScore, Lesson, saved_scores, settings_of
from .checks import OWN_SCORES

LOAD_FORMAT = "dynmask"
"""Of vLLM's ``--load-format``."""


class OwnScores(AnyModel):
    """Dynamic Mask Attention (arXiv 2508.02124, section 3) by the scores of a converted model.

    Args:
        scores: of each layer by its number; layers without one have a window of their own.
    """

    name: ClassVar[str] = OWN_SCORES
    causal: ClassVar[bool] = True
    phase: ClassVar[Literal["both", "prefill"]] = "both"

    def __init__(self, scores: Mapping[int, LayerScore]) -> None:
        self.modules: tuple[nn.Module, ...] = tuple(scores.values())
        self._layers = {index: Dma(score) for index, score in scores.items()}

    @classmethod
    def of_folder(cls, folder: str | Path, kv_heads: int, head_dim: int) -> OwnScores:
        """The scores of a folder that ``save_pretrained`` of a converted model wrote.

        Raises:
            ValueError: a model that was not converted, or scores that are not those of its shape.
        """
        folder = Path(folder)
        settings = settings_of(folder)
        changed = settings.pop(LAYERS, {})
        width = settings["width"]
        width = width if isinstance(width, int) else tuple(width)
        retention = Retention(width, settings["window"], settings["sinks"])
        lesson = Lesson(0.0, 1, 0)  # for training, which is over
        tensors = saved_scores(folder)
        indices = sorted({_index(name) for name in tensors})
        scores = {}
        for index in indices:
            own = Retention(**changed[str(index)]) if str(index) in changed else retention
            rest = settings["form"], own, lesson, settings, index
            score = LayerScore(kv_heads, head_dim, *rest).requires_grad_(False)
            marks = f".{index}.", f".{SCORE}."
            state = {
                name.rpartition(marks[1])[2]: tensor
                for name, tensor in tensors.items()
                if marks[0] in name
            }
            try:
                score.load_state_dict(state)
            except RuntimeError as error:
                raise bad(
                    "converted model", f"scores of {kv_heads} kv heads, head dim {head_dim}",
                    f"others in layer {index} ({error})", "Save it again with save_pretrained.",
                ) from error  # fmt: skip
            scores[index] = score.eval()
        return cls(scores)

    def of_shard(self, rank: int, ranks: int) -> OwnScores:
        """Not defined: a score reads the values of all kv heads."""
        raise bad(
            "dma", "one process, for a score reads the values of all kv heads", f"{ranks} ranks",
            "Leave --tensor-parallel-size out.",
        )  # fmt: skip

    def retention(self, layer: int) -> Retention:
        """What a query of this layer reads."""
        return self._of(layer).retention(layer)

    def scores(self, key: Tensor, value: Tensor, layer: Layer) -> Tensor:
        """Score of each key: [b, g, n]."""
        own = self._of(layer.index)
        if isinstance(own, Dma):
            own.score.to(value.device)  # stays there
        with torch.no_grad():
            return own.scores(key, value, layer)

    def bias(self, scores: Tensor, layer: Layer) -> Tensor | None:
        """What is added to the logits: [b, g, n]."""
        return self._of(layer.index).bias(scores, layer)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> LifetimeMask:
        """The lifetimes of the keys."""
        scores = self.scores(key, value, layer)
        return self.retention(layer.index).mask(scores, query.shape[2])

    def _of(self, index: int) -> Any:
        return self._layers.get(index, WINDOW)


def _index(name: str) -> int:
    """Number of the layer that a score tensor belongs to."""
    numbers = [part for part in name.partition(f".{SCORE}.")[0].split(".") if part.isdigit()]
    if len(numbers) != 1:
        raise bad("converted model", "score tensors of numbered layers", repr(name))
    return int(numbers[0])


def register_loader() -> None:
    """Tell vLLM of the load format."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    class ConvertedLoader(DefaultModelLoader):
        """vLLM's own loader, without scores."""

        def __init__(self, load_config: Any) -> None:
            super().__init__(load_config)
            load_config.load_format = "auto"  # from here on it is as any other

        def get_all_weights(self, *args: Any, **kwargs: Any) -> Any:
            """All weights but those of score modules."""
            for name, tensor in super().get_all_weights(*args, **kwargs):
                if f".{SCORE}." not in name:
                    yield name, tensor

    register_model_loader(LOAD_FORMAT)(ConvertedLoader)


__all__ = ["LOAD_FORMAT", "OwnScores", "register_loader"]
