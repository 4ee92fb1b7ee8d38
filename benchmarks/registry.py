"""What is measured: inputs as data. A case names the tensors and the mask, nothing else."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One attention call. ``mask`` is "top_w" (iid scores) or "window"; ``width`` its keys."""

    keys: int
    width: int
    dtype: str
    mask: str = "top_w"
    heads: int = 8
    groups: int = 2
    dim: int = 64
    rounds: int = 5

    @property
    def name(self) -> str:
        return f"{self.mask} {self.keys:,} / w {self.width} {self.dtype}"


@dataclass(frozen=True)
class Goal:
    """A number that was asked for: ``dense / ours`` of one case."""

    case: str
    goal: str
    target: float
    issue: int = 1


CPU = (
    Case(8192, 512, "float32"),
    Case(16384, 1024, "float32"),
    Case(32768, 1024, "float32"),
    Case(32768, 1024, "bfloat16", rounds=3),
    Case(32768, 1024, "float32", mask="window"),
)

GOALS = (
    Goal(
        CPU[2].name,
        "CPU kernel, exact top-w 32,768 / w 1024 float32, against SDPA, everything included",
        4.0,
    ),
    Goal(CPU[3].name, "CPU kernel, 32,768 / w 1024 bfloat16, against SDPA's bfloat16", 1.0),
)
