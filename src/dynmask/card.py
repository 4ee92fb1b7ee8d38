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
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dynmask.card_file import check, read, to_bytes
from dynmask.card_kinds import (
    GET_ANOTHER,
    POLICIES,
    judged_of,
    origin_of,
    require,
    unpack_bits,
    use_of,
)
from dynmask.checkpoint import write_atomically
from dynmask.fingerprints import describe_model, shape_of

FILE_NAME = "mask_card.safetensors"


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
        check(self.header, self.tensors)

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
        self._compare(shape_of(config))

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
        write_atomically(path, to_bytes(self.header, self.tensors))
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
            return cls(*read(_download(os.fspath(source), revision)), os.fspath(source))
        return cls(*read(path), Path(os.path.abspath(path)).parent.name or None)

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


def _mean(figures: list[list[float]]) -> float:
    return sum(map(sum, figures)) / sum(map(len, figures))


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
