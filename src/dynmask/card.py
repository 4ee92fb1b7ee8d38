"""MaskCard: what calibration or training leaves behind, in one file of data.

`mask_card.safetensors` holds the tensors and, in its metadata under `dynmask`, a JSON header:

    schema     1
    version    the dynmask that wrote it
    policy     "dam", "retained" or "gated"
    settings   what the policy was calibrated with; `length` is what the figures are of
    model      fingerprint, architecture, layers, heads, kv_heads, head_dim
    data       sha256 of the token ids, documents, tokens, seed
    density, kept_mass              [layers][heads], of the mask that long sequences get
    true_density, true_kept_mass    [layers][heads], dam: of the true mask of the first L positions
    windows                         [layers], retained: the model's own sliding window, or null
    curve                           retained: `widths`, and `mass` [layers][kv_heads][widths], the
                                    share of attention that so many keys capture
    kl                              gated: divergence from the full model at the judged tokens
    kl_hard                         gated, soft: the same without the bias
    judged, decoded                 gated: how many tokens were judged, and how many tokens at the
                                    ends of documents read every key, as decoded ones do
    least_mass                      [layers][heads], gated: kept mass in that of the documents where
                                    it is least; what the guard compares with
    encoder                         gated, with encoders: `kept` [layers], and `loss` [layers][2] on
                                    held-out documents, without and with
    scores                          gated, where maps keep by score: `head` and `hidden` of the
                                    score modules, `layers`, which of them have one, and `origin`,
                                    the retained card that they are of: its `name`, or null, the
                                    `sha256` of its tensors, `version`, `documents` and `tokens`

plus a SHA-256 of the header and one of the tensors, which are checked and dropped when loading.
Loading reads bytes and numbers only; it never executes anything, and whatever is wrong with a file
is a `ValueError` before the first tensor is used.
"""

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynmask.card_kinds import (
    GET_ANOTHER,
    POLICIES,
    Layout,
    check_figures,
    is_int,
    judged_of,
    origin_of,
    require,
    section,
    unpack_bits,
    use_of,
)

FILE_NAME = "mask_card.safetensors"
SCHEMA = 1

_METADATA_KEY = "dynmask"
_MAX_JSON_BYTES = 16 * 2**20
_MAX_DIMENSIONS = 8
_DTYPES = {"I32": torch.int32, "U8": torch.uint8, "F32": torch.float32}
_MODEL_FIELDS = ("layers", "heads", "kv_heads", "head_dim")
_SAMPLES_PER_PARAMETER = 16


@dataclass(frozen=True, eq=False, repr=False)
class MaskCard:
    """What masks of one model need, with where it comes from and what they keep.

    `tensors` of a DAM card, for every layer i: `layers.{i}.diagonals` int32 [h, D] and
    `layers.{i}.verticals` int32 [h, V], sorted, padded with -1 at the end;
    `layers.{i}.true_mask` uint8 [h, L, ceil(L / 8)], bit-packed along keys, lowest bit first.
    Of a retained card: `layers.{i}.{name}` float32, the parameters of the layer's score module, for
    every layer without a sliding window of its own. Of a gated card: `window` and `columns` int32
    and `share` float32 and `blocks` int32, all [layers, h], see `dynmask.policies.gates.Gates`,
    and `layers.{i}.of_query` and `layers.{i}.of_key` float32 of layers with a block encoder; where
    maps keep by score, `kept` int32 [layers, h] and `scores.{i}.{name}` float32, the parameters of
    the score modules of layers that have one.

    `source` is the name of the folder, or of the hub repository, that it was loaded from, without
    the path to it; None of a card that was made here.

    Raises ValueError if header and tensors do not form a valid card.
    """

    header: dict[str, Any]
    tensors: dict[str, Tensor]
    source: str | None = None

    def __post_init__(self) -> None:
        _check_header(self.header)
        layout = {name: (t.dtype, tuple(t.shape)) for name, t in self.tensors.items()}
        _check_layout(self.header, layout)
        _check_values(self.header, self.tensors)

    @property
    def length(self) -> int:
        """L, the number of positions that calibration looked at."""
        return self.header["settings"]["length"]

    @property
    def layers(self) -> int:
        """How many attention layers the model has."""
        return self.header["model"]["layers"]

    @property
    def density(self) -> list[list[float]]:
        """[layers][heads]: kept pairs over causal pairs, of the mask of L positions."""
        return self.header["density"]

    @property
    def kept_mass(self) -> list[list[float]]:
        """[layers][heads]: mean share of a row's attention which that mask keeps."""
        return self.header["kept_mass"]

    @property
    def digest(self) -> str:
        """SHA-256 of the tensors' names and numbers, as a hex string."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def patterns(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Diagonals int32 [h, D], verticals int32 [h, V], true mask bool [h, L, L] of a layer."""
        require(
            self.header["policy"] == "dam",
            "a card of policy 'dam', which has patterns",
            f"one of {self.header['policy']!r}, whose masks depend on the input",
            "Look at its masks on a prompt: dynmask inspect --model MODEL --policy retained:CARD.",
        )
        if not 0 <= layer < self.layers:
            raise ValueError(f"layer: expected 0 to {self.layers - 1}, received {layer}.")
        packed = self.tensors[f"layers.{layer}.true_mask"]
        diagonals = self.tensors[f"layers.{layer}.diagonals"]
        verticals = self.tensors[f"layers.{layer}.verticals"]
        return diagonals, verticals, unpack_bits(packed, self.length)

    def policy(self, **options: Any) -> Any:
        """The policy that applies this card, a `Dam`, `Retained` or `Gated`; for `sparsify`.

        Options of a retained card: `width`, keys that a query reads (the card's own when left
        out), and `budget`, "even" (the default: the same width for every head) or "per_head"
        (widths whose mean is `width`, chosen by how much attention mass each head captures with
        more keys). A DAM card takes `share_group`; a gated one `guard`, `soft`, `strength` and
        `decode` in place of its own, and `dense_up_to`, see `dynmask.policies.Gated`.

        Raises ValueError for an unknown option or a width that does not fit.
        """
        return POLICIES[self.header["policy"]].policy(self, **options)

    def check(self, model: nn.Module) -> None:
        """Raise ValueError unless this card was made from `model` (same shape, same weights)."""
        self._compare(describe_model(model))

    def check_shape(self, config: Any) -> None:
        """Raise ValueError unless a model of this `config` can be the card's.

        For before the weights are there; whose weights they are, `check` says.
        """
        self._compare(_shape_of(config))

    def _compare(self, received: dict[str, Any]) -> None:
        """Raise ValueError where what is known of a model differs from the card's."""
        for field in received:
            require(
                received[field] == self.header["model"][field],
                f"the model that it was calibrated on ({field} {self.header['model'][field]})",
                f"a model with {field} {received[field]}",
                "Masks fit one set of weights: calibrate this model with dynmask.calibrate.",
            )

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Write the card into a folder, and a README if it has none; return the card's path.

        The file appears under its name only when it is complete.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE_NAME
        write_atomically(path, self._to_bytes())
        readme = folder / "README.md"
        if not readme.exists():
            write_atomically(readme, self._summary().encode())
        return path

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], *, revision: str | None = None
    ) -> "MaskCard":
        """Load a card from a folder, a file, or a Hugging Face hub name (`owner/name`).

        `revision` is a branch, tag or commit of the hub repository. Raises ValueError for a file
        that is truncated, tampered with, of another schema or out of range.
        """
        path = Path(source)
        if path.is_dir():
            path = path / FILE_NAME
            require(path.is_file(), f"a file {path}", "a folder without it", GET_ANOTHER)
        elif not path.is_file():
            return cls._from_file(_download(os.fspath(source), revision), os.fspath(source))
        return cls._from_file(path, Path(os.path.abspath(path)).parent.name or None)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a dynmask mask card",
    ) -> str:
        """Upload card and README to a model repository, made if need be; return the commit."""
        api = _hub().HfApi(token=token)
        api.create_repo(repo_id, private=private, repo_type="model", exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                repo_type="model",
                revision=revision,
                commit_message=commit_message,
            )
        return str(commit)

    def __repr__(self) -> str:
        model = self.header["model"]
        return (
            f"MaskCard({self.header['policy']}: {model['architecture']}, "
            f"{model['layers']} layers x {model['heads']} heads, L {self.length}, "
            f"density {_mean(self.density):.1%}, kept mass {_mean(self.kept_mass):.1%})"
        )

    def _to_bytes(self) -> bytes:
        from safetensors.torch import save as to_safetensors

        tensors = {name: t.detach().cpu().contiguous() for name, t in self.tensors.items()}
        # The data section does not depend on the metadata, so it can be hashed beforehand.
        plain = to_safetensors(tensors)
        start = 8 + int.from_bytes(plain[:8], "little")
        table = json.loads(plain[8:start])
        seals = {
            "header_sha256": _header_digest(self.header),
            "tensors_sha256": _tensors_digest(table, memoryview(plain)[start:]),
        }
        sealed = json.dumps(self.header | seals, sort_keys=True, allow_nan=False)
        return to_safetensors(tensors, metadata={_METADATA_KEY: sealed})

    @classmethod
    def _from_file(cls, path: Path, source: str | None) -> "MaskCard":
        size = path.stat().st_size
        with path.open("rb") as file:
            table, start = _read_table(file, size)
            header, seals = _read_header(table)
            layout, spans = _check_spans(table, size - start)
            _check_layout(header, layout)
            data = bytearray(file.read())
        require(
            seals == (_header_digest(header), _tensors_digest(table, data)),
            "contents that match its own SHA-256",
            "a file that was changed after it was written",
            GET_ANOTHER,
        )
        tensors = {}
        for name, (first, last) in spans.items():
            dtype, shape = layout[name]
            tensors[name] = torch.frombuffer(data[first:last], dtype=dtype).view(shape)
        return cls(header, tensors, source)

    @property
    def settings(self) -> str:
        """What the policy was calibrated with, in words; lists are in the header."""
        given = self.header["settings"].items()
        return ", ".join(
            f"{k} {v}" for k, v in given if v is not None and not isinstance(v, list | dict)
        )

    def _summary(self) -> str:
        model, data = self.header["model"], self.header["data"]
        shape = (
            f"{model['layers']} layers, {model['heads']} query heads, "
            f"{model['kv_heads']} kv heads, head dim {model['head_dim']}"
        )
        cost = ""
        if "kl" in self.header:
            cost = (
                f"\n| divergence | {self.header['kl']:.4g} nats, {self.header['trials']} trials"
                f"{judged_of(self.header)} |"
            )
        origin = origin_of(self.header)
        scores = f"\n| score heads | {origin} |" if origin else ""
        return f"""---
library_name: dynmask
tags: [sparse-attention, long-context]
---
# Mask card: {self.header["policy"]} for {model["architecture"]}

| | |
|---|---|
| model | {shape} |
| fingerprint | `{model["fingerprint"]}` |
| calibrated on | {data["documents"]} documents, {data["tokens"]} tokens |
| settings | {self.settings} |{cost}{scores}
| density at L {self.length} | {_mean(self.density):.2%} of the causal pairs |
| attention mass kept | {_mean(self.kept_mass):.2%} |
| tensors | `{self.digest}` |
| written by | dynmask {self.header["version"]} |

Density and mass are means over layers and heads, on the calibration documents. The card is for
these weights only.

```python
import dynmask

card = dynmask.MaskCard.from_pretrained("path/to/this/folder")
card.check(model)
{use_of(self.header)}
```
"""


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
    digest = hashlib.sha256(json.dumps(_shape_of(_config_of(model)), sort_keys=True).encode())
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
    return _shape_of(_config_of(model)) | {"fingerprint": fingerprint(model)}


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


def _shape_of(config: Any) -> dict[str, Any]:
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


def _mean(figures: list[list[float]]) -> float:
    return sum(map(sum, figures)) / sum(map(len, figures))


# Reading a file, outermost layer first.


def _read_table(file: Any, size: int) -> tuple[dict[str, Any], int]:
    """The safetensors table and where the data starts."""
    require(size >= 8, "a safetensors file", f"a file of {size} bytes")
    length = int.from_bytes(file.read(8), "little")
    require(
        2 <= length <= min(size - 8, _MAX_JSON_BYTES),
        f"a table of 2 to {min(size - 8, _MAX_JSON_BYTES)} bytes",
        f"one of {length} bytes in a file of {size}",
    )
    return _parse_json(file.read(length), "its table"), 8 + length


def _read_header(table: dict[str, Any]) -> tuple[dict[str, Any], tuple[Any, Any]]:
    """The JSON header and its two seals; takes the metadata out of the table."""
    metadata = table.pop("__metadata__", None)
    text = metadata.get(_METADATA_KEY) if isinstance(metadata, dict) else None
    require(
        isinstance(text, str),
        f"a header in the file's metadata under {_METADATA_KEY!r}",
        "a safetensors file without one",
        "Pass a card written by MaskCard.save_pretrained, not a model's weights.",
    )
    header = _parse_json(str(text).encode(), "its header")
    seals = header.pop("header_sha256", None), header.pop("tensors_sha256", None)
    _check_header(header)
    return header, seals


def _parse_json(text: bytes, what: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name that occurs twice")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(f"the constant {constant}")

    try:
        parsed = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"mask card: expected JSON in {what}, received something else ({error}). {GET_ANOTHER}"
        ) from error
    require(isinstance(parsed, dict), f"a JSON object in {what}", type(parsed).__name__)
    return parsed


def _check_spans(table: dict[str, Any], size: int) -> tuple[Layout, dict[str, tuple[int, int]]]:
    """Layout and byte span of every tensor; together the spans must tile the data exactly."""
    layout: Layout = {}
    spans: dict[str, tuple[int, int]] = {}
    for name, entry in table.items():
        require(
            isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"},
            f"dtype, shape and data_offsets for {name!r}",
            str(entry)[:80],
        )
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        require(
            isinstance(dtype, str) and dtype in _DTYPES,
            f"a dtype among {', '.join(_DTYPES)} for {name!r}",
            str(dtype)[:80],
        )
        require(
            isinstance(shape, list)
            and len(shape) <= _MAX_DIMENSIONS
            and all(is_int(n, 1) and n <= size for n in shape),
            f"a shape of at most {_MAX_DIMENSIONS} positive whole numbers for {name!r}",
            str(shape)[:80],
        )
        need = math.prod(shape) * _DTYPES[dtype].itemsize
        require(
            isinstance(offsets, list)
            and len(offsets) == 2
            and all(is_int(n, 0) for n in offsets)
            and offsets[1] <= size
            and offsets[1] - offsets[0] == need,
            f"{need} bytes within the {size} bytes of data for {name!r}",
            f"data_offsets {str(offsets)[:80]}",
        )
        layout[name] = _DTYPES[dtype], tuple(shape)
        spans[name] = offsets[0], offsets[1]
    end = 0
    for name, (first, last) in sorted(spans.items(), key=lambda item: item[1]):
        require(
            first == end,
            "tensors that follow each other without gap or overlap",
            f"{name!r} at byte {first} where {end} is due",
        )
        end = last
    require(end == size, f"{end} bytes of data", f"{size}: the file is cut or has a tail")
    return layout, spans


def _check_header(header: dict[str, Any]) -> None:
    require(
        header.get("schema") == SCHEMA and is_int(header.get("schema"), 0),
        f"schema {SCHEMA}",
        f"schema {str(header.get('schema'))[:80]}",
        "Use the dynmask that wrote the card, or calibrate again with this one.",
    )
    require(
        isinstance(header.get("policy"), str) and header["policy"] in POLICIES,
        f"a policy among {', '.join(POLICIES)}",
        str(header.get("policy"))[:80],
        "Use a newer dynmask, or calibrate again with this one.",
    )
    require(isinstance(header.get("version"), str), "a version", header.get("version"))
    model, data, settings = (section(header, name) for name in ("model", "data", "settings"))
    for field in _MODEL_FIELDS:
        require(is_int(model.get(field), 1), f"model.{field} of at least 1", model.get(field))
    for field in ("architecture", "fingerprint"):
        require(isinstance(model.get(field), str), f"a name in model.{field}", model.get(field))
    require(
        model["heads"] % model["kv_heads"] == 0,
        "heads that are a multiple of kv_heads",
        f"{model['heads']} and {model['kv_heads']}",
    )
    for field in ("documents", "tokens"):
        require(is_int(data.get(field), 1), f"data.{field} of at least 1", data.get(field))
    require(isinstance(data.get("sha256"), str), "a hash in data.sha256", data.get("sha256"))
    length = settings.get("length")
    require(is_int(length, 2), "settings.length of at least 2", length)
    kind = POLICIES[header["policy"]]
    for name in kind.figures:
        check_figures(name, header.get(name), model["layers"], model["heads"])
    kind.check_header(header)


def _check_layout(header: dict[str, Any], layout: Layout) -> None:
    expected = POLICIES[header["policy"]].layout(header)
    require(
        layout.keys() == expected.keys(),
        f"the {len(expected)} tensors of {header['model']['layers']} layers",
        f"missing {sorted(expected.keys() - layout.keys())[:3]}, "
        f"unknown {sorted(layout.keys() - expected.keys())[:3]}",
    )
    for name, (dtype, shape) in expected.items():
        found_dtype, found = layout[name]
        fits = len(found) == len(shape) and all(
            n == m or (m < 0 and 1 <= n <= -m) for n, m in zip(found, shape, strict=True)
        )
        wanted = [m if m > 0 else f"1 to {-m}" for m in shape]
        require(
            fits and found_dtype == dtype,
            f"{name} {dtype} {wanted}",
            f"{found_dtype} {list(found)}",
        )


def _check_values(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    POLICIES[header["policy"]].check_values(header, tensors)


def _header_digest(header: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def _tensors_digest(table: dict[str, Any], data: "bytearray | memoryview") -> str:
    digest = hashlib.sha256(json.dumps(table, sort_keys=True).encode())
    digest.update(data)
    return digest.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside the target, then rename: an interruption leaves no half-written file."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; a card is as readable as any file of its owner's.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            "The Hugging Face hub needs the package huggingface_hub: "
            "pip install 'dynmask[transformers]'."
        ) from error
    return huggingface_hub


def _download(name: str, revision: str | None) -> Path:
    require(
        re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None,
        "a folder, a file or a hub name (owner/name)",
        f"{name!r}, which does not exist here",
        "Check the path.",
    )
    return Path(_hub().hf_hub_download(name, FILE_NAME, revision=revision))
