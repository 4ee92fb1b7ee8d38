"""What happens while a frozen model is retrofitted: lessons, the training loop, and figures."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from dynmask.checkpoint import read_checkpoint, unreadable, write_atomically
from dynmask.errors import bad
from dynmask.masks import LifetimeMask
from dynmask.nn import Retention, retention_loss_of
from dynmask.policies.base import AnyModel, Layer
from dynmask.policies.retained import score_module
from dynmask.policies.scoring import score_keys
from dynmask.retention import ExactRetention

if TYPE_CHECKING:
    from dynmask.retrofit import RetainedSettings

EXTRA_WIDTHS = (0, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Keys beyond window and sinks at which the captured attention is measured."""

METER_ROWS = 16
"""Query rows of a held-out document whose attention is looked at."""

CHECKPOINT = "dynmask_retrofit"
LEFT = "a run with these settings"


class Batches(Protocol):
    """Where the training gets its tokens."""

    def batch(self, step: int, stage: int) -> Tensor:
        """Token ids of a step, int64 [rows, length]: the same for the same step and stage."""
        ...


class Heads:
    """One score module for each layer without a sliding window, on the layer's device."""

    def __init__(
        self, model: Any, settings: RetainedSettings, description: dict[str, Any], seed: int
    ) -> None:
        from dynmask.integrations.checks import attention_modules, decoder_config

        config = decoder_config(model)
        layers, self.kv_heads = description["layers"], description["kv_heads"]
        attentions: dict[int, Any] = {m.layer_idx: m for m in attention_modules(model)}  # type: ignore[misc]
        window = getattr(config, "sliding_window", None)
        default = "sliding_attention" if window else "full_attention"
        kinds = getattr(config, "layer_types", None) or [default] * layers
        self.windows = [int(window) if k == "sliding_attention" else None for k in kinds]  # type: ignore[arg-type]
        missing = [i for i in range(layers) if i not in attentions]
        if missing or None not in self.windows:
            raise bad(
                "model",
                "attention in every layer, of which one at least has no sliding window",
                f"a model without it in layer {missing[0]}" if missing else "windows everywhere",
                "There is nothing to retain: its cache is bounded already.",
            )
        self.scales: list[float | None] = []
        self.modules: list[nn.Module | None] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for layer, own in enumerate(self.windows):
                attention = attentions[layer]
                scale = getattr(attention, "scaling", None)
                self.scales.append(None if scale is None else float(scale))
                module = None
                if own is None:
                    device = next(attention.parameters()).device
                    module = score_module(asdict(settings), description).to(device)
                self.modules.append(module)

    def trained(self) -> list[tuple[int, nn.Module]]:
        """(layer, module) of every layer that has one."""
        return [(i, module) for i, module in enumerate(self.modules) if module is not None]

    def scores(self, key: Tensor, value: Tensor, layer: Layer) -> Tensor | None:
        """Scores float32 [b, g, n] of rotated keys, None in a layer with a window of its own."""
        module = self.modules[layer.index]
        if module is None:
            return None
        return score_keys(module, key, value, layer)


class Observer(AnyModel):
    """A policy that leaves full attention as it is and looks at every layer's tensors.

    It has what evicting policies have, so that it is given keys before rotation as they are.
    """

    name: ClassVar[str] = "observer"
    causal: ClassVar[bool] = True
    phase: ClassVar[Literal["both", "prefill"]] = "both"

    def __init__(self, heads: Heads) -> None:
        self.heads = heads

    def retention(self, layer: int) -> Retention:
        """A window alone, where no score chooses and the policy itself is asked for the mask."""
        return Retention(1, 1)

    def scores(self, key: Tensor, value: Tensor, layer: Layer) -> Tensor | None:
        """The scores of a layer, None where it has a window of its own."""
        return self.heads.scores(key, value, layer)

    def bias(self, scores: Tensor, layer: Layer) -> None:
        """None."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> LifetimeMask:
        """Look, and let every key be read."""
        self.look(query, key, value, layer)
        return LifetimeMask.causal(key.shape[2], query.shape[2], device=key.device)

    def look(self, query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> None:
        """Look at the tensors of one call: query [b, h, n, d], key and value [b, g, n, d]."""
        raise NotImplementedError


class Teacher(Observer):
    """Computes each layer's loss and its gradients while the model runs; nothing is stored."""

    def __init__(self, heads: Heads, settings: RetainedSettings) -> None:
        super().__init__(heads)
        self.settings = settings
        self.losses: list[Tensor] = []

    def look(self, query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> None:
        """Add the gradients of a layer's loss to its module, and keep the loss."""
        with torch.enable_grad():
            scores = self.scores(key, value, layer)
            if scores is None:
                return
            loss = retention_loss_of(
                query,
                key,
                scores,
                rows=self.settings.rows,
                after=self.settings.window,
                scale=self.heads.scales[layer.index],
                late=self.settings.late,
                protect=self.settings.retention,
            )
            loss.backward()
        self.losses.append(loss.detach())


class Training:
    """The loop and all of its state: heads, optimizer, step, seconds."""

    def __init__(
        self, model: Any, data: Batches, settings: RetainedSettings, seed: int, heads: Heads
    ) -> None:
        self.model, self.data, self.settings, self.seed, self.heads = (
            model, data, settings, seed, heads,
        )  # fmt: skip
        self.parameters = {
            f"{layer}.{name}": parameter
            for layer, module in heads.trained()
            for name, parameter in module.named_parameters()
        }
        self.device = next(model.get_input_embeddings().parameters()).device
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=settings.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=settings.weight_decay,
        )
        self.step, self.seconds = 0, 0.0
        self.losses: list[float] = []

    def recent(self) -> float:
        """Mean loss of a layer over the newest steps."""
        newest = self.losses[-20:]
        return sum(newest) / max(len(newest), 1)

    def run(self, path: Path | None, identity: Any, save_seconds: float, progress: bool) -> None:
        """Train to the end; on Ctrl-C leave a checkpoint, if there is a path for it."""
        from tqdm.auto import tqdm

        from dynmask.integrations.transformers import sparsify

        settings = self.settings
        total = settings.steps if settings.steps is not None else 60 * settings.minutes
        began = time.perf_counter() - self.seconds
        saved = self.seconds
        training = [(module, module.training) for module in self.model.modules()]
        teacher = Teacher(self.heads, settings)
        waiting: list[Tensor] = []
        try:
            self.model.eval()
            with (
                sparsify(self.model, teacher),
                _forked(self.device),
                tqdm(
                    total=round(total),
                    initial=round(min(self._done(), total)),
                    desc="training",
                    unit="step" if settings.steps else "s",
                    disable=not progress,
                ) as bar,
            ):
                while self._done() < total:
                    self._train(teacher, self._done() / total, waiting)
                    every = 1 if self.step <= 10 or self.device.type == "cpu" else 10
                    if self.step % every == 0:
                        self._note(waiting)  # waits for the device, so that the clock is right
                        self.seconds = time.perf_counter() - began
                        bar.set_postfix_str(f"step {self.step}, loss {self.recent():.3f}")
                        bar.update(min(round(self._done()), bar.total) - bar.n)
                    if path is not None and self.seconds - saved >= save_seconds:
                        self.save(path, identity)
                        saved = self.seconds
            self._note(waiting)
            if path is not None:
                self.save(path, identity)
        except KeyboardInterrupt:
            if path is not None:
                self._note(waiting)
                self.seconds = time.perf_counter() - began
                self.save(path, identity)
            raise
        finally:
            for module, mode in training:
                module.training = mode

    def _done(self) -> float:
        return self.step if self.settings.steps is not None else self.seconds

    def _train(self, teacher: Teacher, progress: float, waiting: list[Tensor]) -> None:
        """One step; adds the mean loss of a layer, on the device, to ``waiting``."""
        stage = self.settings.stage(self.seed, self.step, progress)
        ids = self.data.batch(self.step, stage).to(self.device, non_blocking=True)
        # The loss draws its rows from the default generator: what it draws depends on the step
        # alone, so that a resumed run draws the same.
        torch.manual_seed(hash((self.seed, self.step)) % 2**63)
        teacher.losses.clear()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(self.step, progress)
        with torch.no_grad():
            # The base model, without the head: nobody needs the logits.
            self.model.base_model(input_ids=ids, use_cache=False)
        losses = [loss.to(self.device) for loss in teacher.losses]
        with _whole():
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            waiting.append(torch.stack(losses).mean())

    def _note(self, waiting: list[Tensor]) -> None:
        if not waiting:
            return
        values = torch.stack(waiting).tolist()
        waiting.clear()
        if not all(map(math.isfinite, values)):
            raise RuntimeError(
                f"retrofit: expected a finite loss, received {values[-1]} by step {self.step}; "
                "load the model in float32 or bfloat16, or lower the learning rate"
            )
        self.losses += values

    def save(self, path: Path, identity: Any) -> None:
        """Write everything that goes on, in one piece."""
        from safetensors.torch import save

        tensors = {}
        for name, parameter in self.parameters.items():
            tensors[f"head.{name}"] = parameter.detach()
            for moment in ("exp_avg", "exp_avg_sq"):
                state = self.optimizer.state.get(parameter, {})
                tensors[f"{moment}.{name}"] = state.get(moment, torch.zeros_like(parameter))
        state = {
            "identity": identity,
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses[-20:],
        }
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save(tensors, {CHECKPOINT: json.dumps(state)}))

    def load(self, path: Path, identity: Any) -> None:
        """Take over what ``save`` wrote; ValueError for another file or another run."""
        state, tensors = read_checkpoint(path, CHECKPOINT, LEFT)
        try:
            same = state["identity"] == json.loads(json.dumps(identity))
            parts = [
                (p, *(tensors[f"{kind}.{name}"] for kind in ("head", "exp_avg", "exp_avg_sq")))
                for name, p in self.parameters.items()
            ]
            fits = all(t.shape == p.shape for p, *ts in parts for t in ts)
            step, seconds, losses = state["step"], state["seconds"], state["losses"]
        except Exception as error:
            raise unreadable(path, LEFT, error) from error
        if not same or not fits:
            raise bad(
                "checkpoint",
                "one of the same model, documents, settings and seed",
                f"{path}, which is of another run",
                "Delete it, or name another file.",
            )
        self.step, self.seconds, self.losses = int(step), float(seconds), list(losses)
        for parameter, head, first, second in parts:
            with torch.no_grad():
                parameter.copy_(head)
            if self.step:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": first.to(parameter),
                    "exp_avg_sq": second.to(parameter),
                }


class Meter(Observer):
    """Measures how much of each layer's attention its scores would keep at several widths."""

    def __init__(self, heads: Heads, settings: RetainedSettings, widths: list[int]) -> None:
        super().__init__(heads)
        self.settings, self.widths = settings, widths
        self.density: dict[int, list[Tensor]] = {}
        self.mass: dict[tuple[int, int], list[Tensor]] = {}

    def look(self, query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> None:
        """Note density and kept mass of a layer at every width."""
        from dynmask.integrations.tally import kept_mass, sampled_rows

        index, n = layer.index, key.shape[2]
        window, heads = self.heads.windows[index], query.shape[1]
        scores = self.scores(key, value, layer)
        if scores is None:
            mask = LifetimeMask.window(n, window or n, device=key.device)
            self.density.setdefault(index, []).append(mask.density().expand(1, heads))
            return
        scale = self.heads.scales[index] or query.shape[-1] ** -0.5
        rows = sampled_rows(n, METER_ROWS)
        for width in sorted({*self.widths, self.settings.width}):
            retention = ExactRetention(width, self.settings.window, self.settings.sinks)
            mask = retention.mask(scores)
            share = kept_mass(query, key, mask, rows, scale, None).mean(-1)
            self.mass.setdefault((index, width), []).append(share)
            if width == self.settings.width:
                density = mask.density().repeat_interleave(heads // scores.shape[1], 1)
                self.density.setdefault(index, []).append(density)


def measure(
    model: Any, heads: Heads, settings: RetainedSettings, windows: Tensor
) -> dict[str, Any]:
    """Density, kept mass and curve of a card, on ``windows`` int64 [documents, n]."""
    from dynmask.integrations.transformers import sparsify

    base, n = settings.window + settings.sinks, windows.shape[1]
    widths = [base + extra for extra in EXTRA_WIDTHS if extra == 0 or base + extra < n]
    meter = Meter(heads, settings, widths)
    training = [(module, module.training) for module in model.modules()]
    device = next(model.get_input_embeddings().parameters()).device
    try:
        model.eval()
        with sparsify(model, meter), torch.no_grad():
            for window in windows.split(1):
                model.base_model(input_ids=window.to(device), use_cache=False)
    finally:
        for module, mode in training:
            module.training = mode
    density, kept, curve = [], [], []
    for layer, own in enumerate(heads.windows):
        share = torch.cat(meter.density[layer]).double().mean(0).clamp(0, 1)
        density.append(share.tolist())
        if own is not None:
            kept.append([1.0] * len(share))
            curve.append([[1.0] * len(widths)] * heads.kv_heads)
            continue
        mass = {
            width: torch.cat(meter.mass[layer, width]).double().mean(0).clamp(0, 1)
            for width in {*widths, settings.width}
        }
        kept.append(mass[settings.width].tolist())
        grouped = [mass[w].view(heads.kv_heads, -1).mean(-1) for w in widths]
        curve.append(torch.stack(grouped, -1).tolist())
    return {
        "density": density,
        "kept_mass": kept,
        "curve": {"widths": widths, "mass": curve},
    }


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """Ctrl-C waits until the block is done, so that what is saved then is of one step."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is None:
        yield  # only the main thread is interrupted, and only by a handler of Python's
        return
    waiting: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if waiting:
        signal.raise_signal(signal.SIGINT)


def _forked(device: torch.device) -> Any:
    """A context after which the caller's random numbers are what they were."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
