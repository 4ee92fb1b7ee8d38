"""The file of a MaskCard: bytes to header and tensors and back, everything checked on the way."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynmask.card_kinds import (
    GET_ANOTHER,
    POLICIES,
    Layout,
    check_figures,
    is_int,
    require,
    section,
)

SCHEMA = 1

_METADATA_KEY = "dynmask"
_MAX_JSON_BYTES = 16 * 2**20
_MAX_DIMENSIONS = 8
_DTYPES = {"I32": torch.int32, "U8": torch.uint8, "F32": torch.float32}
_MODEL_FIELDS = ("layers", "heads", "kv_heads", "head_dim")


def check(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless header and tensors form a valid card."""
    _check_header(header)
    _check_layout(header, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()})
    POLICIES[header["policy"]].check_values(header, tensors)


def to_bytes(header: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    """The file of a card, sealed by a SHA-256 of its header and one of its tensors."""
    from safetensors.torch import save as to_safetensors

    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    # The data section does not depend on the metadata, so it can be hashed beforehand.
    plain = to_safetensors(tensors)
    start = 8 + int.from_bytes(plain[:8], "little")
    table = json.loads(plain[8:start])
    seals = {
        "header_sha256": _header_digest(header),
        "tensors_sha256": _tensors_digest(table, memoryview(plain)[start:]),
    }
    sealed = json.dumps(header | seals, sort_keys=True, allow_nan=False)
    return to_safetensors(tensors, metadata={_METADATA_KEY: sealed})


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file; ValueError where it is damaged, tampered with or another's.

    The outermost layer is checked first: table, header, spans, layout, digests. What tensors hold
    is checked by :func:`check`.
    """
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
    return header, tensors


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


def _header_digest(header: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def _tensors_digest(table: dict[str, Any], data: "bytearray | memoryview") -> str:
    digest = hashlib.sha256(json.dumps(table, sort_keys=True).encode())
    digest.update(data)
    return digest.hexdigest()
