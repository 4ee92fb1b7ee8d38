"""What is measured on a GPU: inputs as data. A case names tensors, mask and variants; a goal names
the number that was asked for. Everything is bfloat16."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class GpuCase:
    """One attention call.

    ``mask`` is one of

    * "top_w": the best ``width`` of every prefix by iid normal scores, one score per kv head;
    * "streaming": ``sinks`` first keys and the newest ``width``;
    * "causal": every key, by our kernel;
    * "auto": every key, by what ``impl="auto"`` picks;
    * "block": blocks of 128, iid with probability ``density`` per query head, the own one always;
    * "structural": ``diagonals`` offsets and ``verticals`` columns per query head, the offsets as
      ``layout`` says: "bands" of 8 neighbours at random places, or "scattered" alone;
    * "decode": one query, ``width`` random keys per batch row and kv head, a plan made beforehand.

    ``variants`` are the adapters of ``peers.py`` that are timed beside ours; ``peers`` says whether
    those of other projects are too, when asked for. ``rounds`` are timings of each variant, and
    ``once`` names the variants that are so slow that one timing must do.
    """

    mask: str
    keys: int
    width: int = 0
    variants: tuple[str, ...] = ("cudnn",)
    layout: str = ""
    density: float = 0.0
    sinks: int = 0
    diagonals: int = 0
    verticals: int = 0
    batch: int = 1
    heads: int = 32
    groups: int = 8
    dim: int = 128
    rounds: int = 10
    once: tuple[str, ...] = ()
    peers: bool = False

    @property
    def queries(self) -> int:
        return 1 if self.mask == "decode" else self.keys

    @property
    def name(self) -> str:
        more = {
            "top_w": f" / w {self.width}",
            "streaming": f" / {self.sinks}+{self.width}",
            "block": f" / {self.density:.0%}",
            "structural": f" / {self.diagonals} {self.layout} + {self.verticals}",
            "decode": f" / {self.width} kept x {self.batch}",
        }
        return f"{self.mask} {self.keys:,}{more.get(self.mask, '')}"

    def small(self) -> "GpuCase":
        """The same case where the dense oracle is quick: for the check before timing."""
        keys = min(self.keys, 2048)
        return replace(
            self,
            keys=keys,
            width=min(self.width, keys // 8),
            density=max(self.density, 0.2) if self.density else 0.0,
            diagonals=min(self.diagonals, 32),
            batch=min(self.batch, 2),
        )

    def tiny(self) -> "GpuCase":
        """The same case for a trial of the runner without a GPU."""
        return replace(
            self.small(),
            keys=256,
            width=min(self.width, 32),
            sinks=min(self.sinks, 4),
            diagonals=min(self.diagonals, 16),
            verticals=min(self.verticals, 4),
            heads=4,
            groups=2,
            dim=16,
            rounds=2,
        )


LENGTHS_OF_AUTO = (512, 1024, 2048, 4096, 8192)


def _structural(keys: int, layout: str) -> GpuCase:
    """64 diagonals and 32 verticals per query head."""
    return GpuCase(
        "structural",
        keys,
        layout=layout,
        diagonals=64,
        verticals=32,
        rounds=6,
        peers=layout == "bands" and keys == 131072,
    )


# In the order in which they run: what a goal was set for comes first.
CASES = (
    GpuCase("top_w", 8192, 1024, ("cudnn", "fa2"), rounds=20, peers=True),
    GpuCase("top_w", 131072, 2048, ("cudnn", "fa2"), rounds=6),
    GpuCase("decode", 524288, 2048, ("sdpa", "folded"), batch=8, rounds=15, peers=True),
    *(_structural(131072, layout) for layout in ("bands", "scattered")),
    GpuCase("causal", 8192, variants=("cudnn", "fa2"), rounds=20, peers=True),
    *(GpuCase("auto", n, variants=("sdpa",), rounds=15) for n in LENGTHS_OF_AUTO),
    GpuCase("top_w", 32768, 1024, ("cudnn", "fa2", "flex"), peers=True),
    GpuCase("block", 131072, variants=("cudnn", "flex"), density=0.05, rounds=6, peers=True),
    GpuCase("top_w", 1048576, 2048, ("cudnn",), rounds=4, once=("cudnn",)),
    GpuCase("streaming", 32768, 1024, ("cudnn", "fa2"), sinks=64, peers=True),
    GpuCase("streaming", 131072, 1024, ("cudnn",), sinks=64, rounds=6),
    GpuCase("streaming", 8192, 1024, ("cudnn", "fa2"), sinks=64, rounds=20),
    GpuCase("block", 32768, density=0.05),
    *(_structural(32768, layout) for layout in ("bands", "scattered")),
)


@dataclass(frozen=True)
class Goal:
    """A number that was asked for.

    ``metric`` is "speedup" (time of ``against`` / ours), "time ratio" (ours / time of ``against``)
    or a field of our row. Of several names in ``against`` the fastest counts.
    """

    case: str
    goal: str
    target: float
    metric: str = "speedup"
    against: tuple[str, ...] = ("cudnn",)
    better: str = "higher"
    issue: int = 2


def _top_w_goals() -> tuple[Goal, ...]:
    goals = []
    cases = {case.keys: case for case in CASES if case.mask == "top_w"}
    for keys, target in ((32768, 8.0), (131072, 20.0), (1048576, 120.0)):
        case = cases[keys]
        what = f"exact top-w {case.keys:,} / w {case.width} forward"
        goals.append(Goal(case.name, f"{what} against cuDNN, everything included", target))
        goals.append(
            Goal(
                case.name,
                f"{what}: selection and lowering, share of the time",
                0.15,
                metric="share",
                against=(),
                better="lower",
            )
        )
    return tuple(goals)


def _named(mask: str, layout: str = "", keys: int = 0) -> str:
    """Name of the one case with this mask, layout and length."""
    (name,) = (
        case.name
        for case in CASES
        if case.mask == mask
        and (not layout or case.layout == layout)
        and (not keys or case.keys == keys)
    )
    return name


GOALS = (
    *_top_w_goals(),
    Goal(
        _named("top_w", keys=8192),
        "forward at 8,192, w 1024, selection included, against Doge's own sdpa path",
        10.0,
        against=("doge (transformers)",),
        issue=3,
    ),
    Goal(
        _named("top_w", keys=131072),
        "exact top-w 131,072 / w 2048 forward: kept work per second, everything included",
        400.0,
        metric="kept_tflops",
        against=(),
    ),
    Goal(
        _named("top_w", keys=32768),
        "exact top-w 32,768 / w 1024 forward against FlexAttention's kernel alone",
        12.0,
        against=("flex",),
    ),
    Goal(_named("block", keys=131072), "blocks of 128 at 5 %, 131,072 tokens, against cuDNN", 9.0),
    Goal(
        _named("block", keys=131072),
        "blocks of 128 at 5 %, 131,072 tokens, against FlexAttention's kernel alone",
        1.0,
        against=("flex",),
    ),
    *(
        Goal(
            _named("structural", layout, 131072),
            f"64 diagonals ({layout}) and 32 verticals, 131,072 tokens, against cuDNN",
            40.0,
        )
        for layout in ("bands", "scattered")
    ),
    Goal(
        _named("decode"),
        "decode, 2,048 of 524,288 keys, batch 8: bandwidth of the kept bytes, share of a copy's",
        0.70,
        metric="bandwidth_share",
        against=(),
    ),
    Goal(
        _named("decode"),
        "decode, 2,048 of 524,288 keys, batch 8, against dense SDPA",
        40.0,
        against=("sdpa", "folded"),
    ),
    Goal(
        _named("causal"),
        "dense causal 8,192 by our kernel against FlashAttention-2",
        0.85,
        against=("fa2",),
    ),
    *(
        Goal(
            _named("auto", keys=n),
            f'impl="auto" on a plain causal mask of {n:,} tokens, time over SDPA\'s',
            1.03,
            metric="time ratio",
            against=("sdpa",),
            better="lower",
        )
        for n in LENGTHS_OF_AUTO
    ),
)

NOTES: dict[str, str] = {
    "decode, 2,048 of 524,288 keys, batch 8, against dense SDPA": (
        "attention alone, over lists made beforehand"
    ),
    "64 diagonals (scattered) and 32 verticals, 131,072 tokens, against cuDNN": (
        "a lone diagonal costs a tile of 64 rows 64 keys for 64 pairs: one computed pair in 64 is "
        "kept. No two of a tile's lone diagonals share a key, so every pair brings its 512 bytes "
        "of key and value, some 69 GB a call, which a kernel along diagonals would read too"
    ),
    "decode, 2,048 of 524,288 keys, batch 8: bandwidth of the kept bytes, share of a copy's": (
        "rows of 256 bytes gathered from everywhere: the kernel alone takes 31 of 34 microseconds, "
        "the rest are two fills; splits 3 to 8, steps 32 to 128, 4 and 8 warps, 3 to 6 stages "
        "tried, the best within 3 %; merging in the same launch instead of a second changed nothing"
    ),
}
"""What bounds a goal that was missed, by the goal's text; figures are added by the runner."""
