"""What an evaluation found: rows, a table to read, and JSON that says how it was measured."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "SCHEMA",
    "Bucket",
    "ItemResult",
    "Report",
    "Row",
    "atomic_write",
    "paired_difference",
    "proportion_interval",
]

SCHEMA = 1
Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution
RESAMPLES = 10_000


@dataclass(frozen=True)
class ItemResult:
    """What one policy did with one item.

    Densities and masses are means over layers and heads, from 0 to 1; ``None`` means not measured.
    ``kl`` is KL(full || policy) in nats of the next-token distributions, over the generated
    positions up to and including the first where the two answers part; ``agreement`` is the share
    of these positions at which both would choose the same token. ``widened`` is the share of the
    prompt's maps that the guard of a gated policy made wider than its card says.
    """

    policy: str
    group: str
    index: int
    score: float
    text: str
    answers: tuple[str, ...]
    meta: dict[str, Any]
    prompt_tokens: int
    new_tokens: int
    density: float | None = None
    density_decode: float | None = None
    kept_mass: float | None = None
    kept_mass_p5: float | None = None
    kept_mass_decode: float | None = None
    kl: float | None = None
    agreement: float | None = None
    widened: float | None = None
    density_per_head: list[list[float] | None] | None = None
    kept_mass_per_head: list[list[float] | None] | None = None
    selection_seconds: float | None = None


@dataclass(frozen=True)
class Bucket:
    """Perplexity of the tokens at positions ``start`` to ``stop`` (exclusive)."""

    start: int
    stop: int
    tokens: int
    nll: float

    @property
    def perplexity(self) -> float:
        """The exponential of the mean negative log-likelihood (nats) of a token."""
        return math.exp(min(self.nll, 700.0))


@dataclass(frozen=True)
class Row:
    """One policy on one group of items: a line of the table.

    ``right`` is the sum of the scores of ``n`` items. Seconds are those of the timed runs, memory
    is in bytes above the level at which the phase began; ``cache_bytes`` is the cache at the end of
    a timed run, bounded where the policy evicts. ``difference`` is the accuracy less that
    of the baseline on the same items. For perplexity, ``n`` counts documents and ``buckets`` is
    filled; ``right`` and ``accuracy`` are ``None``. ``metrics`` is what a task that is not our own
    reports by itself, by name.
    """

    policy: str
    group: str
    n: int
    causal: bool
    right: float | None = None
    accuracy: float | None = None
    accuracy_interval: tuple[float, float] | None = None
    difference: float | None = None
    difference_interval: tuple[float, float] | None = None
    difference_method: str | None = None
    density: float | None = None
    density_decode: float | None = None
    kept_mass: float | None = None
    kept_mass_p5: float | None = None
    kept_mass_decode: float | None = None
    kl: float | None = None
    agreement: float | None = None
    widened: float | None = None
    prefill_seconds: float | None = None
    ms_per_token: float | None = None
    peak_memory_bytes: int | None = None
    cache_bytes: int | None = None
    selection_seconds: float | None = None
    buckets: tuple[Bucket, ...] = ()
    perplexity: float | None = None
    density_per_head: list[list[float] | None] | None = None
    kept_mass_per_head: list[list[float] | None] | None = None
    metrics: dict[str, float | None] | None = None


@dataclass(frozen=True)
class Report:
    """The outcome of one evaluation run.

    Args:
        task: the task's name.
        header: how it was measured: versions, device, dtype, settings, seed, model fingerprint.
        rows: one per policy and group, in the order of the run.
        items: the result of every item under every policy.
        complete: false when the run was interrupted.
        timing: the timed runs, one entry for each policy and timed item.
        reading: what the policies read of one prompt, see :func:`dynmask.evals.reading.reading`.
    """

    task: str
    header: dict[str, Any]
    rows: tuple[Row, ...]
    items: tuple[ItemResult, ...] = ()
    complete: bool = True
    timing: tuple[dict[str, Any], ...] = field(default=())
    reading: dict[str, Any] | None = None

    @property
    def groups(self) -> list[str]:
        """The groups in the order of their first row."""
        return list(dict.fromkeys(row.group for row in self.rows))

    def table(self) -> str:
        """Return an aligned plain-text table, one block per group, with a line on how."""
        if not self.rows:
            return "no item was finished"
        blocks = [_table([row for row in self.rows if row.group == group]) for group in self.groups]
        titles = [f"{self.task}, {group}" for group in self.groups]
        body = "\n\n".join(f"{title}\n{block}" for title, block in zip(titles, blocks, strict=True))
        notes = [self._provenance()]
        if any(not row.causal for row in self.rows):
            notes.append("* chooses its mask with a view of later tokens of the prompt")
        if not self.complete:
            notes.append("interrupted: only the finished items are counted")
        return body + "\n\n" + "\n".join(notes)

    def _provenance(self) -> str:
        head = self.header
        device = head["device"]
        threads = f", {device['threads']} threads" if device["type"] == "cpu" else ""
        return (
            f"model {head['model']['name']}, {head['dtype']}, {device['name']}{threads}, "
            f"seed {head['settings'].get('seed')}, torch {head['versions']['torch']}, "
            f"dynmask {head['versions']['dynmask']}, {head['date'][:10]}"
        )

    def caption(self, n: int | None = None) -> str:
        """Return the line that every picture carries: model, n, device, seed."""
        head = self.header
        count = n if n is not None else max((row.n for row in self.rows), default=0)
        name = head["device"]["name"]
        seed = head["settings"].get("seed")
        drawn = "" if seed is None else f", seed {seed}"
        return f"{head['model']['name']}, n = {count}, {name}, {head['dtype']}{drawn}"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-serialisable data."""
        rows = [asdict(row) for row in self.rows]
        for data, row in zip(rows, self.rows, strict=True):
            data["buckets"] = [
                {**asdict(bucket), "perplexity": bucket.perplexity} for bucket in row.buckets
            ]
        return _finite(
            {
                "schema": SCHEMA,
                "task": self.task,
                "complete": self.complete,
                **self.header,
                "rows": rows,
                "timing": list(self.timing),
                "items": [asdict(item) for item in self.items],
                "reading": self.reading,
            }
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "report") -> Report:
        """Return the report that :meth:`to_dict` gave ``data``; ``where`` names it in errors.

        Raises:
            ValueError: on another schema, or data that is no report.
        """
        schema = data.get("schema") if isinstance(data, Mapping) else None
        if schema != SCHEMA or "rows" not in data:
            raise ValueError(
                f"{where}: expected a report of schema {SCHEMA}, received "
                f"{'schema ' + repr(schema) if schema is not None else 'something else'}; "
                "pass a file that dynmask evaluate --out wrote"
            )
        try:
            rows = tuple(_row_of(row) for row in data["rows"])
            items = tuple(_item_of(item) for item in data.get("items", ()))
            header = {key: value for key, value in data.items() if key not in OUTSIDE}
            _check_header(header)
            return cls(
                str(data["task"]),
                header,
                rows,
                items,
                bool(data.get("complete", True)),
                tuple(data.get("timing", ())),
                data.get("reading"),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{where}: expected a whole report, received one without {error}; "
                "pass a file that dynmask evaluate --out wrote, unchanged"
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Return the report of a JSON file that :meth:`save` wrote.

        Raises:
            ValueError: if the file cannot be read or is no report.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(
                f"{path}: expected a report in JSON, received {error}; "
                "pass a file that dynmask evaluate --out wrote"
            ) from error
        return cls.from_dict(data, str(path))

    def to_json(self) -> str:
        """Return the report as JSON text (numbers that are not finite become null)."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def save(self, directory: str | os.PathLike[str], name: str | None = None) -> Path:
        """Write ``<name>.json`` and ``<name>.txt`` (the table) and return the JSON's path.

        Each file is written beside its place and moved there, so no reader sees half of one.
        ``name`` is the task's name unless given.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        stem = name or self.task
        atomic_write(folder / f"{stem}.txt", self.table() + "\n")
        target = folder / f"{stem}.json"
        atomic_write(target, self.to_json() + "\n")
        return target


# What of a report's JSON is not its header.
OUTSIDE = ("schema", "task", "complete", "rows", "timing", "items", "reading")


def _check_header(header: Mapping[str, Any]) -> None:
    """Look for what tables, captions and pages say of every report."""
    for section, names in {
        "device": ("name", "type", "threads"),
        "model": ("name",),
        "versions": ("torch", "dynmask"),
        "settings": (),
    }.items():
        for name in names:
            _ = header[section][name]
    _ = header["date"], header["dtype"]


def _row_of(data: Mapping[str, Any]) -> Row:
    """Return a row from JSON, where tuples are lists and buckets tell their perplexity."""
    known = {item.name for item in fields(Row)}
    values = {key: value for key, value in data.items() if key in known}
    for name in ("accuracy_interval", "difference_interval"):
        if values.get(name) is not None:
            values[name] = tuple(values[name])
    values["buckets"] = tuple(
        Bucket(b["start"], b["stop"], b["tokens"], math.inf if b["nll"] is None else b["nll"])
        for b in values.get("buckets", ())
    )
    return Row(**values)


def _item_of(data: Mapping[str, Any]) -> ItemResult:
    known = {item.name for item in fields(ItemResult)}
    values = {key: value for key, value in data.items() if key in known}
    return ItemResult(**{**values, "answers": tuple(values["answers"])})


def atomic_write(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` through a temporary file in the same folder."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        mode = 0o666 & ~_umask()
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _finite(data: Any) -> Any:
    """Replace numbers that JSON cannot say (NaN, infinities) by ``None``."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return data


# --- table -------------------------------------------------------------------------------------


def _percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _right(row: Row) -> str:
    if row.right is None:
        return "-"
    right = f"{row.right:.0f}" if row.right == int(row.right) else f"{row.right:.2f}"
    return f"{right}/{row.n} {_percent(row.accuracy, 0):>5}"


def _difference(row: Row) -> str:
    if row.difference is None or row.difference_interval is None:
        return "-"
    low, high = row.difference_interval
    return f"{100 * row.difference:+.0f} [{100 * low:+.0f}, {100 * high:+.0f}]"


def _memory(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:,.0f} MiB"


def _cache(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:,.{0 if value >= 2**30 else 1}f} MiB"


def _density(row: Row) -> str:
    if row.density is None:
        return "-"
    return _percent(row.density, 1 if row.density >= 0.01 else 2)


def _columns(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    columns = [("policy", [row.policy + ("" if row.causal else " *") for row in rows])]
    if any(row.buckets for row in rows):
        columns.append(("perplexity", [_number(row.perplexity, 3) for row in rows]))
        for index, bucket in enumerate(rows[0].buckets):
            title = f"{bucket.start}-{bucket.stop}"
            columns.append((title, [_number(row.buckets[index].perplexity, 3) for row in rows]))
    else:
        columns.append(("right", [_right(row) for row in rows]))
        if any(row.difference is not None for row in rows):
            columns.append(("vs full, 95 %", [_difference(row) for row in rows]))
    columns.append(("density", [_density(row) for row in rows]))
    optional = [
        ("decode", "density_decode", lambda row: _percent(row.density_decode)),
        ("mass kept", "kept_mass", lambda row: _percent(row.kept_mass)),
        ("p5", "kept_mass_p5", lambda row: _percent(row.kept_mass_p5)),
        ("KL", "kl", lambda row: _number(row.kl, 3)),
        ("widened", "widened", lambda row: _percent(row.widened)),
        ("prefill", "prefill_seconds", lambda row: _seconds(row.prefill_seconds)),
        ("ms/token", "ms_per_token", lambda row: _number(row.ms_per_token, 1)),
        ("cache", "cache_bytes", lambda row: _cache(row.cache_bytes)),
        ("peak memory", "peak_memory_bytes", lambda row: _memory(row.peak_memory_bytes)),
    ]
    for title, attribute, render in optional:
        if any(getattr(row, attribute) is not None for row in rows):
            columns.append((title, [render(row) for row in rows]))
    for name in dict.fromkeys(name for row in rows for name in row.metrics or ()):
        columns.append((name, [_number((row.metrics or {}).get(name), 3) for row in rows]))
    return columns


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.{2 if value >= 0.1 else 4}f} s"


def _table(rows: Sequence[Row]) -> str:
    columns = _columns(rows)
    widths = [max(len(title), *map(len, cells)) for title, cells in columns]
    lines = [[title for title, _ in columns], ["-" * width for width in widths]]
    lines += [[cells[index] for _, cells in columns] for index in range(len(rows))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


# --- statistics --------------------------------------------------------------------------------


def proportion_interval(right: float, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval for a share of ``right`` out of ``n``; never empty.

    For graded scores the same formula is an upper bound of the width, for a score between 0 and 1
    varies no more than a right-or-wrong one of the same mean.
    """
    share = right / n
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n))
    # At shares of 0 and 1 rounding could leave the share itself outside by an ulp.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def paired_difference(
    scores: Sequence[float], baseline: Sequence[float], seed: int = 0
) -> tuple[float, tuple[float, float], str]:
    """Return mean(scores - baseline), its 95 % interval and the interval's name.

    Right-or-wrong scores get Bonett and Price's adjusted Wald interval for paired proportions
    (2012), which stays honest when no pair differs: no differences among ten items do not prove
    equality. Graded scores get a percentile bootstrap over items.

    Raises:
        ValueError: if the two do not pair up, or are empty.
    """
    if len(scores) != len(baseline) or not scores:
        raise ValueError(
            f"expected one baseline score for every score and at least one, received {len(scores)} "
            f"and {len(baseline)}; compare policies on the same items"
        )
    n = len(scores)
    differences = [a - b for a, b in zip(scores, baseline, strict=True)]
    mean = sum(differences) / n
    if all(value in (0.0, 1.0) for value in (*scores, *baseline)):
        gained = (sum(value > 0 for value in differences) + 1) / (n + 2)
        lost = (sum(value < 0 for value in differences) + 1) / (n + 2)
        half = Z95 * math.sqrt((gained + lost - (gained - lost) ** 2) / (n + 2))
        centre = gained - lost
        interval = (max(-1.0, centre - half), min(1.0, centre + half))
        return mean, interval, "Bonett-Price adjusted Wald, paired"
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(differences, dtype=torch.float64)
    draws = torch.randint(n, (RESAMPLES, n), generator=generator)
    means = values[draws].mean(dim=1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return mean, (low, high), f"percentile bootstrap over items, {RESAMPLES} resamples"
