"""What a mask card of each policy holds: its header, its tensors, and how they are checked."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .card import MaskCard
    from .policies import Dam, Retained
    from .policies.gated import Gated

GET_ANOTHER = "Fetch the card again, or calibrate the model again with dynmask.calibrate."
MAX_HIDDEN = 2**16
ENCODER_TENSORS = ("of_query", "of_key")
"""Parameters of a block encoder that a gated card holds."""

SCORES = "scores"
"""Where a gated card holds the parameters of score modules: ``scores.LAYER.NAME``."""

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name -> dtype and shape of every tensor."""


def pack_bits(mask: Tensor) -> Tensor:
    """Bool [..., n] to uint8 [..., ceil(n / 8)], lowest bit first; unused bits are 0."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, length: int) -> Tensor:
    """Bool [..., length] of what `pack_bits` packed."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & 1).bool().flatten(-2)[..., :length]


def require(
    condition: bool, expected: str, received: object, remedy: str = GET_ANOTHER, what: str = "card"
) -> None:
    """Raise ValueError unless the condition holds."""
    if not condition:
        raise ValueError(f"mask {what}: expected {expected}, received {received}. {remedy}")


def section(header: dict[str, Any], name: str) -> dict[str, Any]:
    """A JSON object of a header."""
    found = header.get(name)
    require(isinstance(found, dict), f"a JSON object {name!r} in its header", found)
    return found or {}


def check_figures(name: str, figures: Any, layers: int, heads: int) -> None:
    """Shares, one for each layer and head."""
    shares = isinstance(figures, list) and len(figures) == layers
    shares = shares and all(isinstance(row, list) and len(row) == heads for row in figures)
    shares = shares and all(
        isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x <= 1
        for row in figures
        for x in row
    )
    require(shares, f"{name} as {layers} x {heads} numbers from 0 to 1", str(figures)[:80])


def is_int(value: Any, least: int) -> bool:
    """Whether a JSON value is a whole number of at least ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_options(options: dict[str, Any], known: tuple[str, ...]) -> None:
    """Raise ValueError for an option that a policy does not have."""
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise ValueError(
            f"policy: expected options among {', '.join(known)}, received {unknown[0]!r}."
        )


class DamTensors:
    """What the tensors of a DAM card must look like."""

    figures = ("density", "kept_mass", "true_density", "true_kept_mass")

    @staticmethod
    def policy(card: MaskCard, **options: Any) -> Dam:
        """The policy of a card."""
        from dynmask.policies import Dam

        check_options(options, ("share_group",))
        return Dam(card, **options)

    @staticmethod
    def check_header(header: dict[str, Any]) -> None:
        """Nothing beyond what every card has."""

    @staticmethod
    def layout(header: dict[str, Any]) -> Layout:
        """Every tensor; a negative size -n stands for anything from 1 to n."""
        heads, length = header["model"]["heads"], header["settings"]["length"]
        layout: Layout = {}
        for layer in range(header["model"]["layers"]):
            layout[f"layers.{layer}.diagonals"] = torch.int32, (heads, -length)
            layout[f"layers.{layer}.verticals"] = torch.int32, (heads, -length)
            layout[f"layers.{layer}.true_mask"] = (
                torch.uint8,
                (heads, length, (length + 7) // 8),
            )
        return layout

    @staticmethod
    def check_values(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """What the numbers must be."""
        length = header["settings"]["length"]
        past = pack_bits(torch.ones(length, length, dtype=torch.bool).tril())
        for name, tensor in tensors.items():
            if name.endswith("true_mask"):
                valid = not (tensor.cpu() & ~past).any()
                require(valid, f"{name} with causal pairs only", "a bit for a future key")
            else:
                _check_offsets(name, tensor.cpu(), length)


def _check_offsets(name: str, offsets: Tensor, length: int) -> None:
    require(
        bool(((offsets >= -1) & (offsets < length)).all()),
        f"{name} in [0, {length}), or -1 for padding",
        f"{int(offsets.min())} to {int(offsets.max())}",
    )
    left, right = offsets[:, :-1], offsets[:, 1:]
    ordered = ((right > left) & (left >= 0)) | (right == -1)
    require(bool(ordered.all()), f"{name} sorted, without repeats, padding last", "another order")


class RetainedTensors:
    """What the tensors of a retained card must look like: parameters of score modules."""

    figures = ("density", "kept_mass")

    @staticmethod
    def policy(card: MaskCard, **options: Any) -> Retained:
        """The policy of a card."""
        from dynmask.policies.retained import from_card

        check_options(options, ("width", "budget"))
        return from_card(card, **options)

    @staticmethod
    def check_header(header: dict[str, Any]) -> None:
        """Settings that the policy is built from, windows and curve."""
        settings, model, length = header["settings"], header["model"], header["settings"]["length"]
        head = settings.get("head")
        require(head in ("pair", "value"), "settings.head 'pair' or 'value'", str(head)[:80])
        for name, least in {"hidden": 1, "width": 1, "window": 0, "sinks": 0}.items():
            most = MAX_HIDDEN if name == "hidden" else 2**31 - 1
            value = settings.get(name)
            require(
                is_int(value, least) and value <= most,
                f"settings.{name} from {least} to {most}",
                str(value)[:80],
            )
        floor = settings["window"] + settings["sinks"]
        require(settings["width"] >= floor, f"settings.width >= {floor}", settings["width"])
        sizes = model["kv_heads"], model["head_dim"]
        require(max(sizes) <= MAX_HIDDEN, f"kv_heads and head_dim up to {MAX_HIDDEN}", sizes)
        windows = header.get("windows")
        require(
            isinstance(windows, list)
            and len(windows) == model["layers"]
            and all(w is None or (is_int(w, 1) and w < 2**31) for w in windows),
            f"windows as {model['layers']} whole numbers or null",
            str(windows)[:80],
        )
        curve = section(header, "curve")
        widths, mass = curve.get("widths"), curve.get("mass")
        require(
            isinstance(widths, list)
            and len(widths) >= 1
            and all(is_int(w, 1) and w < 2**31 for w in widths)
            and all(a < b for a, b in itertools.pairwise(widths))
            and widths[0] >= max(floor, 1),
            f"curve.widths as rising whole numbers from {floor}",
            str(widths)[:80],
        )
        require(
            isinstance(mass, list) and len(mass) == model["layers"],
            f"curve.mass of {model['layers']} layers",
            str(mass)[:80],
        )
        for layer, table in enumerate(mass or []):
            check_figures(f"curve.mass[{layer}]", table, model["kv_heads"], len(widths or []))
        require(length <= 2**31, "settings.length up to 2**31", length)

    @staticmethod
    def layout(header: dict[str, Any]) -> Layout:
        """Every tensor: what a score module of these sizes has, for each layer that has one."""
        from dynmask.policies.retained import score_module

        module = score_module(header["settings"], header["model"], device="meta")
        return {
            f"layers.{layer}.{name}": (torch.float32, tuple(tensor.shape))
            for layer, window in enumerate(header["windows"])
            if window is None
            for name, tensor in module.state_dict().items()
        }

    @staticmethod
    def check_values(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """What the numbers must be."""
        for name, tensor in tensors.items():
            require(bool(tensor.isfinite().all()), f"{name} finite", "NaN or infinity")


def judged_of(header: dict[str, Any]) -> str:
    """What a gated card says of the tokens that its divergence is about; empty where nothing."""
    if "judged" not in header:
        return ""
    return f", {header['judged']} tokens judged, {header.get('decoded', 0)} read as decoded ones"


def origin_of(header: dict[str, Any]) -> str:
    """Which retained card the score heads of a gated card are of; empty where it does not say."""
    origin = header["policy"] == "gated" and header.get(SCORES, {}).get("origin")
    if not origin:
        return ""
    name = "a retained card without a name" if origin["name"] is None else f"`{origin['name']}`"
    return (
        f"{name}, tensors `{origin['sha256']}`, trained on {origin['documents']} documents, "
        f"{origin['tokens']} tokens, by dynmask {origin['version']}"
    )


def use_of(header: dict[str, Any]) -> str:
    """The lines of Python that generate under a card, with the cache that frees what it drops."""
    drops = header["settings"].get("decode", "full") != "full"
    cache = {"retained": "BoundedCache", "gated": drops and "GatedCache"}.get(header["policy"])
    if not cache:
        return "with dynmask.sparsify(model, card.policy()):\n    model.generate(**inputs)"
    return (
        "with dynmask.sparsify(model, card.policy()) as run:\n"
        f"    model.generate(**inputs, past_key_values=dynmask.{cache}(run))"
    )


def slashes_in(settings: dict[str, Any]) -> bool:
    """Whether the settings of a gated card offer diagonals; such a card has a table of them."""
    budgets = settings.get("budgets", ())
    return any(isinstance(b, dict) and b.get("slashes", 0) for b in budgets)


class GatedTensors:
    """What the tensors of a gated card must look like: one number for each map."""

    figures = ("density", "kept_mass")

    @staticmethod
    def policy(card: MaskCard, **options: Any) -> Gated:
        """The policy of a card."""
        from dynmask.gated_settings import gated_of

        check_options(options, ("guard", "decode", "dense_up_to", "soft", "strength"))
        return gated_of(card, **options)

    @staticmethod
    def check_header(header: dict[str, Any]) -> None:
        """Settings that the policy is built from, and the divergence."""
        from dynmask.gated_settings import settings_of

        try:
            settings_of(header["settings"])
        except (TypeError, ValueError, KeyError, OverflowError, RuntimeError) as error:
            require(False, "settings of a gated policy", str(error)[:120])
        for name in ("kl", "kl_hard"):
            kl = header.get(name, 0 if name == "kl_hard" else None)
            number = isinstance(kl, int | float) and not isinstance(kl, bool)
            require(number and 0 <= kl < math.inf, f"{name} of at least 0", str(kl)[:80])  # type: ignore[operator]
        trials = header.get("trials")
        require(is_int(trials, 0), "a number of trials", str(trials)[:80])
        for name in ("judged", "decoded"):  # cards of a time before these say nothing
            count = header.get(name, 0)
            require(is_int(count, 0), f"a number of tokens in {name}", str(count)[:80])
        if header["settings"].get("encoder"):
            GatedTensors._check_encoder(header)
        if SCORES in header:
            GatedTensors._check_scores(header)
        if "least_mass" in header:
            sizes = header["model"]["layers"], header["model"]["heads"]
            check_figures("least_mass", header["least_mass"], *sizes)

    @staticmethod
    def layout(header: dict[str, Any]) -> Layout:
        """A number for each map; blocks where the card is of a time that knew them.

        Diagonals where its settings offer some. What maps keep by score, and the parameters of the
        score modules, where there are any.
        """
        shape = header["model"]["layers"], header["model"]["heads"]
        tables: Layout = {
            "window": (torch.int32, shape),
            "columns": (torch.int32, shape),
            "share": (torch.float32, shape),
        }
        settings, model = header["settings"], header["model"]
        if "block" in settings:
            tables["blocks"] = torch.int32, shape
        if slashes_in(settings):
            tables["slashes"] = torch.int32, shape
        kept = header["encoder"]["kept"] if settings.get("encoder") else []
        rank, dim = settings.get("rank", 0), model["head_dim"]
        for layer, good in enumerate(kept):
            if good:
                sizes = (model["heads"], dim + 1, rank), (model["kv_heads"], 2 * dim, rank)
                for name, size in zip(ENCODER_TENSORS, sizes, strict=True):
                    tables[f"layers.{layer}.{name}"] = torch.float32, size
        if SCORES in header:
            from dynmask.policies.retained import score_module

            tables["kept"] = torch.int32, shape
            state = score_module(header[SCORES], model, device="meta").state_dict()
            for layer, scored in enumerate(header[SCORES]["layers"]):
                if scored:
                    for name, tensor in state.items():
                        tables[f"{SCORES}.{layer}.{name}"] = torch.float32, tuple(tensor.shape)
        return tables

    @staticmethod
    def _check_scores(header: dict[str, Any]) -> None:
        """What the score modules are, and which layers have one."""
        told, model = section(header, SCORES), header["model"]
        require(told.get("head") == "pair", "scores.head 'pair'", str(told.get("head"))[:80])
        hidden, flags = told.get("hidden"), told.get("layers")
        require(
            is_int(hidden, 1) and hidden <= MAX_HIDDEN,  # type: ignore[operator]
            f"scores.hidden from 1 to {MAX_HIDDEN}",
            str(hidden)[:80],
        )
        sizes = model["kv_heads"], model["head_dim"]
        require(max(sizes) <= MAX_HIDDEN, f"kv_heads and head_dim up to {MAX_HIDDEN}", sizes)
        require(
            isinstance(flags, list)
            and len(flags) == model["layers"]
            and all(isinstance(flag, bool) for flag in flags),
            f"scores.layers as {model['layers']} times true or false",
            str(flags)[:80],
        )
        if "origin" in told:  # cards of a time before do not say
            GatedTensors._check_origin(section(told, "origin"))

    @staticmethod
    def _check_origin(origin: dict[str, Any]) -> None:
        """What is said of the card that the score modules are of."""
        name = origin.get("name", 0)
        require(name is None or isinstance(name, str), "a name in scores.origin", str(name)[:80])
        for field in ("sha256", "version"):
            found = origin.get(field)
            require(isinstance(found, str), f"scores.origin.{field} as text", str(found)[:80])
        for field in ("documents", "tokens"):
            found = origin.get(field)
            require(is_int(found, 1), f"scores.origin.{field} of at least 1", str(found)[:80])

    @staticmethod
    def _check_encoder(header: dict[str, Any]) -> None:
        """Which layers have an encoder, and what it lowered the loss to."""
        layers = header["model"]["layers"]
        figures = section(header, "encoder")
        kept, loss = figures.get("kept"), figures.get("loss")
        flags = isinstance(kept, list) and len(kept) == layers
        flags = flags and all(isinstance(good, bool) for good in kept)  # type: ignore[union-attr]
        require(flags, f"encoder.kept as {layers} times true or false", str(kept)[:80])
        rows = isinstance(loss, list) and len(loss) == layers
        rows = rows and all(isinstance(row, list) and len(row) == 2 for row in loss)  # type: ignore[union-attr]
        rows = rows and all(
            isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x < math.inf
            for row in loss  # type: ignore[union-attr]
            for x in row
        )
        require(rows, f"encoder.loss as {layers} x 2 numbers of at least 0", str(loss)[:80])

    @staticmethod
    def check_values(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """What the numbers must be."""
        from dynmask.policies.gated import Gates

        for name, tensor in tensors.items():
            finite = tensor.dtype != torch.float32 or bool(tensor.isfinite().all())
            require(finite, f"{name} finite", "NaN or infinity")
        gates = Gates(**{name: x.cpu() for name, x in tensors.items() if "." not in name})
        for layer, kept in enumerate(gates.keeping):
            scored = SCORES in header and header[SCORES]["layers"][layer]
            require(
                scored or not kept,
                f"scores of layer {layer}, whose maps keep by score", "none",
            )  # fmt: skip


POLICIES: dict[str, type[DamTensors] | type[RetainedTensors] | type[GatedTensors]] = {
    "dam": DamTensors,
    "retained": RetainedTensors,
    "gated": GatedTensors,
}
