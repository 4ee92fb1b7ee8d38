"""Block encoders of a frozen model, taught by its own attention; each layer learns alone.

While the model runs as it is, every layer's encoder is asked what key blocks some of the query
blocks will look at, and learns from the attention that these pay to them, computed for the drawn
blocks only: nothing is N x N, whatever the length of the document. Only ``of_query`` and ``of_key``
learn; with the gain of the estimate free as well, what is learned generalises worse. An encoder is
kept where it foretells held-out documents better than the estimate without it.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dynmask.checkpoint import read_checkpoint, unreadable, write_atomically
from dynmask.encoder import BlockEncoder
from dynmask.encoder_loss import encoder_loss_of
from dynmask.errors import bad
from dynmask.masks import LifetimeMask
from dynmask.policies.base import AnyModel, Layer
from dynmask.teaching import _forked, _whole

if TYPE_CHECKING:
    from dynmask.gated_settings import GatedSettings

SHARE = 0.01
"""Parameters of all encoders over those of the model, at most."""

LATE = 0.25
"""Share of the query blocks that are drawn near the end of a document."""

CHECKPOINT = "dynmask_encoder"
LEFT = "the training of encoders"


class EncoderTraining:
    """Encoders of all layers, the documents they learn from, and how far they are.

    Args:
        model: a causal language model that ``dynmask.sparsify`` takes; it stays as it is.
        documents: token ids, 1-D int64. A fifth of those that are long enough is held out.
        settings: sizes, steps and teacher.
        seed: of every random choice.
        description: the model's entry in a card's header.

    Raises:
        ValueError: encoders too large for the model, or fewer than two documents long enough.
    """

    def __init__(
        self,
        model: Any,
        documents: Sequence[Tensor],
        settings: GatedSettings,
        seed: int,
        description: dict[str, Any],
    ) -> None:
        from dynmask.integrations.checks import attention_modules

        self.model, self.settings, self.seed = model, settings, seed
        self.device = next(model.get_input_embeddings().parameters()).device
        self._divide(documents)
        places: dict[int, Any] = {m.layer_idx: m for m in attention_modules(model)}  # type: ignore[misc]
        self.encoders: list[BlockEncoder] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for layer in range(description["layers"]):
                encoder = encoder_of(settings, description)
                encoder.gain.requires_grad_(False)
                own = next(places[layer].parameters(), None) if layer in places else None
                self.encoders.append(encoder.to(self.device if own is None else own.device))
        self._check_size()
        self.parameters = {
            f"{layer}.{name}": getattr(encoder, name)
            for layer, encoder in enumerate(self.encoders)
            for name in ("of_query", "of_key")
        }
        self.optimizer = torch.optim.Adam(self.parameters.values(), betas=(0.9, 0.98))
        self.step = 0

    def _divide(self, documents: Sequence[Tensor]) -> None:
        """Hold out a fifth of the documents that have four blocks, one at least."""
        least = 4 * self.settings.block
        able = [document for document in documents if len(document) >= least]
        if len(able) < 2:
            raise bad(
                "documents",
                f"two of {least} tokens at least, one to learn from and one to judge by",
                f"{len(able)}",
                "Pass more, or leave out the encoder.",
            )
        order = random.Random(f"held out/{self.seed}").sample(able, len(able))
        count = max(len(able) // 5, 1)
        self.held_out, self.taught = order[:count], order[count:]

    def _check_size(self) -> None:
        """Raise ValueError unless the encoders are small beside the model."""
        count = sum(p.numel() for encoder in self.encoders for p in encoder.parameters())
        of_model = sum(p.numel() for p in self.model.parameters())
        if count > SHARE * of_model:
            raise bad(
                "settings.rank",
                f"encoders of at most {SHARE:.0%} of the model's {of_model:,} parameters",
                f"rank {self.settings.rank}, which makes {count:,}",
                "Lower rank, or leave out the encoder.",
            )

    def run(self, path: Path | None, identity: Any, progress: bool) -> None:
        """Learn; on Ctrl-C leave a checkpoint, if there is a path for it."""
        from tqdm.auto import tqdm

        from dynmask.integrations.transformers import sparsify

        total, teacher = self.settings.steps, _Teacher(self.encoders, self.settings)
        if path is not None and path.exists():
            self._load(path, identity)
        elif path is not None:
            self._save(path, identity)  # a path that cannot be written fails before the work
        bar = tqdm(
            total=total, initial=self.step, desc="encoder", unit="step", disable=not progress
        )
        try:
            with sparsify(self.model, teacher), _forked(self.device), bar:
                while self.step < total:
                    self._learn(teacher)
                    loss = float(torch.stack([x.to(self.device) for x in teacher.losses]).mean())
                    if not math.isfinite(loss):
                        raise RuntimeError(
                            f"encoder: expected a finite loss, received {loss} at step {self.step};"
                            " load the model in float32 or bfloat16, or lower settings.rate"
                        )
                    bar.set_postfix_str(f"loss {loss:.3f}")
                    bar.update()
        finally:
            if path is not None:
                self._save(path, identity)

    def _learn(self, teacher: _Teacher) -> None:
        """One step: a document, and a step of every layer's encoder."""
        rng = random.Random(f"encoder/{self.seed}/{self.step // len(self.taught)}")
        order = rng.sample(range(len(self.taught)), len(self.taught))
        document = self.taught[order[self.step % len(self.taught)]]
        rate = 0.5 * (1 + math.cos(math.pi * self.step / self.settings.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate * rate
        # what is drawn depends on the step alone, so that a resumed run draws the same
        torch.manual_seed(hash((self.seed, self.step)) % 2**63)
        self._show(document, teacher)
        with _whole():
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1

    @torch.no_grad()
    def _show(self, document: Tensor, teacher: _Teacher) -> None:
        """Run the model on a document; the teacher hears of every layer."""
        teacher.losses.clear()
        ids = document.long()[None].to(self.device)
        self.model.base_model(input_ids=ids, use_cache=False)

    def judge(self) -> tuple[tuple[BlockEncoder | None, ...], dict[str, Any]]:
        """The encoders of the layers where they are of use, and how well each foretells.

        Returns:
            An encoder or None for each layer, and the figures of a card: ``loss`` on the held-out
            documents, [layers][2], of the estimate and with the encoder; ``kept``, [layers].
        """
        from dynmask.integrations.transformers import sparsify

        plain = [copy.deepcopy(encoder) for encoder in self.encoders]
        for encoder in plain:
            nn.init.zeros_(encoder.of_key)
        found = []
        for encoders in (plain, self.encoders):
            teacher, losses = _Teacher(encoders, self.settings, learns=False), []
            with sparsify(self.model, teacher), _forked(self.device):
                for number, document in enumerate(self.held_out):
                    torch.manual_seed(hash((self.seed, -1 - number)) % 2**63)  # the same blocks
                    self._show(document, teacher)
                    losses.append(torch.stack([x.cpu() for x in teacher.losses]))
            found.append(torch.stack(losses).double().mean(0))
        kept = (found[1] < found[0]).tolist()
        figures = {
            "loss": torch.stack(found, 1).tolist(),
            "kept": kept,
            "held_out": len(self.held_out),
        }
        chosen = (
            copy.deepcopy(encoder).cpu().requires_grad_(False) if good else None
            for encoder, good in zip(self.encoders, kept, strict=True)
        )
        return tuple(chosen), figures

    def _save(self, path: Path, identity: Any) -> None:
        """Write everything that goes on, in one piece."""
        from safetensors.torch import save

        tensors = {}
        for name, parameter in self.parameters.items():
            state = self.optimizer.state.get(parameter, {})
            tensors[f"encoder.{name}"] = parameter
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}.{name}"] = state.get(moment, torch.zeros_like(parameter))
        tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
        about = json.dumps({"identity": identity, "step": self.step})
        write_atomically(path, save(tensors, {CHECKPOINT: about}))

    def _load(self, path: Path, identity: Any) -> None:
        """Take over what ``_save`` wrote; ValueError for another file or another run."""
        kinds = ("encoder", "exp_avg", "exp_avg_sq")
        about, tensors = read_checkpoint(path, CHECKPOINT, LEFT)
        try:
            parts = [
                (parameter, *(tensors[f"{kind}.{name}"] for kind in kinds))
                for name, parameter in self.parameters.items()
            ]
            same, step = about["identity"] == json.loads(json.dumps(identity)), int(about["step"])
        except Exception as error:
            raise unreadable(path, LEFT, error) from error
        fits = all(x.shape == parameter.shape for parameter, *some in parts for x in some)
        if not same or not fits or not 0 <= step <= self.settings.steps:
            raise bad(
                "checkpoint",
                "one of the same model, documents, settings and seed",
                f"{path}, which is of another run",
                "Delete it, or name another file.",
            )
        self.step = step
        for parameter, value, first, second in parts:
            with torch.no_grad():
                parameter.copy_(value)
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": first.to(parameter),
                "exp_avg_sq": second.to(parameter),
            }


def encoder_of(settings: GatedSettings, description: dict[str, Any]) -> BlockEncoder:
    """An encoder of the sizes that settings and model ask for, float32 whatever the default is."""
    encoder = BlockEncoder(
        description["heads"],
        description["kv_heads"],
        description["head_dim"],
        block=settings.block,
        rank=settings.rank,
        query_pool=settings.query_pool,
        key_pool=settings.key_pool,
    )
    return encoder.float()


class _Teacher(AnyModel):
    """A policy that leaves full attention as it is and teaches every layer's encoder."""

    name: ClassVar[str] = "encoder teacher"
    causal: ClassVar[bool] = True
    phase: ClassVar[Literal["both", "prefill"]] = "both"

    def __init__(
        self, encoders: Sequence[BlockEncoder], settings: GatedSettings, learns: bool = True
    ) -> None:
        self.encoders, self.settings, self.learns = encoders, settings, learns
        self.losses: list[Tensor] = []

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> LifetimeMask:
        """Add the gradients of a layer's loss to its encoder, keep the loss, read every key."""
        with torch.set_grad_enabled(self.learns):
            loss = encoder_loss_of(
                self.encoders[layer.index],
                query,
                key,
                value,
                query_blocks=self.settings.lessons,
                late=LATE,
                teacher=self.settings.teacher,
            )
            if self.learns:
                loss.backward()
        self.losses.append(loss.detach())
        return LifetimeMask.causal(key.shape[2], query.shape[2], device=key.device)
