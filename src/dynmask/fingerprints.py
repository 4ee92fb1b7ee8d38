"""What tells one model's weights from another's, without reading all of them."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLES_PER_PARAMETER = 16


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's shape and of a sample of its weights, as a hex string.

    The sample is up to 16 evenly spread elements of every parameter, rounded to bfloat16, so that
    the same checkpoint gives the same fingerprint in float32 and in bfloat16 and on any device.
    Parameters that are split over processes are gathered one at a time: every process calls this.
    """
    return fingerprint_of(model, _samples_of(model))


def fingerprint_of(
    model: nn.Module, samples: Iterable[tuple[str, tuple[int, ...], list[float]]]
) -> str:
    """The fingerprint of a model's shape and of samples of its weights.

    `samples` holds name, shape and sample (see `sampled`) of every parameter, in order of names.
    """
    digest = hashlib.sha256(json.dumps(shape_of(_config_of(model)), sort_keys=True).encode())
    for name, shape, sample in samples:
        digest.update(f"{name} {shape} {sample}\n".encode())
    return digest.hexdigest()


def _samples_of(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...], list[float]]]:
    for name, parameter in sorted(model.named_parameters()):
        if parameter.is_meta:
            raise ValueError(
                f"model: expected loaded weights, received {name} on the meta device. "
                "Load the weights before you calibrate or check a card."
            )
        yield name, tuple(parameter.shape), _sample(whole(parameter))


def describe_model(model: nn.Module) -> dict[str, Any]:
    """The `model` entry of a card's header."""
    return shape_of(_config_of(model)) | {"fingerprint": fingerprint(model)}


def whole(parameter: Tensor) -> Tensor:
    """A parameter itself, or all of one that is split over processes (a DTensor)."""
    gathered = getattr(parameter, "full_tensor", None)
    return parameter if gathered is None else gathered()


def _sample(parameter: Tensor) -> list[float]:
    flat = parameter.detach().reshape(-1)
    return sampled(flat.numel(), lambda at: flat[torch.tensor(at).to(flat.device)])


def sampled(numel: int, read: Callable[[list[int]], Tensor]) -> list[float]:
    """The numbers that stand for a parameter of so many, rounded; `read` gives those at places."""
    count = min(_SAMPLES_PER_PARAMETER, numel)
    values = read([i * numel // count for i in range(count)])
    if values.is_floating_point():
        values = values.to(torch.bfloat16)
    return values.cpu().tolist()


def _config_of(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    if config is None:
        raise ValueError(
            f"model: expected a transformers model, received {type(model).__name__} without a "
            "config. Pass what AutoModelForCausalLM.from_pretrained returns."
        )
    return config


def shape_of(config: Any) -> dict[str, Any]:
    """Architecture, layers, heads, kv heads and head dim of a config, as a header has them."""
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    return {
        "architecture": config.model_type,
        "layers": config.num_hidden_layers,
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
    }
