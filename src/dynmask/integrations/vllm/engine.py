"""The policy of one process, and what its layers are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger

from ...errors import bad
from ...policies import parse
from ..rotary import turn_back
from .checks import (
    OWN_SCORES,
    by_learned_scores,
    check_engine,
    check_layer,
    check_policy,
    head_dim_of,
    layer_index,
    note_on_chunks,
    reads_keys,
    shape_of,
    shard,
)
from .layer import PagedLayer, decodes_whole
from .settings import CARD, POLICY, Settings

logger = init_logger(__name__)

_engines: dict[tuple[Any, ...], Engine] = {}


class Engine:
    """A policy, checked against a model, for the heads of this process.

    Args:
        settings: what was asked for.
        config: vLLM's configuration.
    """

    def __init__(self, settings: Settings, config: VllmConfig) -> None:
        model = config.model_config
        text = model.hf_text_config
        policy = _policy(settings.policy, str(model.model), text)
        card = getattr(policy, "card", None)
        check_policy(policy, text, None if card is None else card.header["model"])
        check_engine(config, policy)
        if reads_keys(policy) and model.uses_mrope:
            raise bad(
                policy.name, "one position for each token", "a model with several (M-RoPE)",
                "Use score heads that look at values alone (retained, head='value').",
            )  # fmt: skip
        if card is not None:
            self._check_weights(card, str(model.model))
        note = note_on_chunks(
            policy,
            bool(config.scheduler_config.enable_chunked_prefill),
            bool(config.cache_config.enable_prefix_caching),
        )
        if note:
            logger.warning("dynmask: %s", note)
        ranks = config.parallel_config.tensor_parallel_size
        rank = get_tensor_model_parallel_rank() if ranks > 1 else 0
        self.policy = shard(policy, rank, ranks, shape_of(text)[2])
        self.impl, self.phase = settings.impl, settings.phase
        logger.info("dynmask: attention under %s", settings.policy)

    @property
    def decodes_whole(self) -> bool:
        """Whether a step of decoded tokens alone is plain attention."""
        return decodes_whole(self.policy, self.phase)

    @classmethod
    def of(cls, config: VllmConfig) -> Engine:
        """The engine of a configuration, made once in each process."""
        settings = Settings.of(config.additional_config)
        if settings is None:
            raise bad(
                "dynmask", f"a card or a policy: {CARD}=FOLDER, {POLICY}=streaming, or "
                '--additional-config \'{"dynmask": {"card": "FOLDER"}}\'', "none",
                "Name one, or leave --attention-backend CUSTOM out.",
            )  # fmt: skip
        scheduler, cache, parallel = (
            config.scheduler_config,
            config.cache_config,
            config.parallel_config,
        )
        name = (
            settings, str(config.model_config.model), parallel.tensor_parallel_size,
            cache.cache_dtype, cache.enable_prefix_caching, scheduler.enable_chunked_prefill,
        )  # fmt: skip
        if name not in _engines:
            _engines[name] = cls(settings, config)
        return _engines[name]

    @staticmethod
    def _check_weights(card: Any, name: str) -> None:
        """Refuse a card of other weights, as far as the files of a model tell."""
        from ..checkpoint import checkpoint_folder, fingerprint_of_files

        folder = checkpoint_folder(name)
        found = None if folder is None else fingerprint_of_files(folder)
        if found is None:
            logger.warning("dynmask: the files of %s do not tell whether the card is theirs", name)
        elif found != card.header["model"]["fingerprint"]:
            raise bad(
                "mask card", "the weights that it was calibrated on", f"others in {folder}",
                "Masks fit one set of weights: calibrate this model with dynmask calibrate.",
            )  # fmt: skip


class Parts:
    """What vLLM makes an attention layer of, kept until the layer's name is known.

    Arguments as vLLM passes them to an attention implementation.
    """

    def __init__(
        self,
        engine: Engine,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        window: int | None,
        s_aux: Tensor | None,
    ) -> None:
        self.engine = engine
        self._sizes = heads, kv_heads, head_dim, float(scale)
        self._window, self._s_aux = window, s_aux
        self._layer: PagedLayer | None = None

    @classmethod
    def check(
        cls,
        config: VllmConfig,
        kind: object,
        alibi: object,
        soft_cap: float | None,
        shared: str | None,
    ) -> Engine:
        """The engine of a layer; ValueError for one that cannot be served."""
        engine = Engine.of(config)
        kind = getattr(kind, "value", kind)
        check_layer(str(kind), alibi, soft_cap, shared, by_learned_scores(engine.policy))
        return engine

    def layer(self, name: str) -> PagedLayer:
        """The layer of a name, made when it is first called."""
        if self._layer is None:
            policy = self.engine.policy
            unrotate = _unrotate if reads_keys(policy) else None
            rest = self._window, self._s_aux, self.engine.impl, unrotate, self.engine.phase
            self._layer = PagedLayer(policy, layer_index(name), *self._sizes, *rest)
        return self._layer


def _policy(spec: str, model: str, config: Any) -> Any:
    """A policy by its text form, or that of a converted model itself."""
    if spec != OWN_SCORES:
        return parse(spec)
    from ..checkpoint import checkpoint_folder
    from .converted import OwnScores

    folder = checkpoint_folder(model)
    if folder is None:
        raise bad("dma", "a converted model whose files are here", repr(model))
    return OwnScores.of_folder(folder, shape_of(config)[2], head_dim_of(config))


def _unrotate(first: int) -> Callable[[Tensor], Tensor]:
    """What takes the rotation off keys from a position on."""
    table = _rotation()

    def back(key: Tensor) -> Tensor:
        rows = table[first : first + key.shape[2]].to(key.device)
        cos, sin = rows.float().chunk(2, -1)
        return turn_back(key.float(), cos[None], sin[None])

    return back


def _rotation() -> Tensor:
    """Cosines and sines of the model's rotary embedding [positions, r]."""
    from vllm.model_executor.layers import rotary_embedding

    found = list(rotary_embedding._ROPE_DICT.values())
    usable = [x for x in found if getattr(x, "is_neox_style", False)]
    if len(found) != 1 or len(usable) != 1:
        raise bad(
            "rotary embedding", "one that turns halves of a head, for all layers",
            f"{len(found)} of which {len(usable)} do",
            "Use score heads that look at values alone (head='value').",
        )  # fmt: skip
    return usable[0].cos_sin_cache


__all__ = ["Engine", "Parts"]
