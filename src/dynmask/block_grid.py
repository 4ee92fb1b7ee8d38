"""Where queries and keys lie on a grid of blocks that starts at position 0."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import bad
from .masks.base import check_whole
from .summary import BlockSummary


@dataclass(frozen=True)
class BlockGrid:
    """Where query rows and keys lie on the grid of blocks."""

    block: int
    pool: int
    first_key: int
    start: int
    """Position of the first query row."""
    stop: int
    """Position after the last row, and after the last key."""

    @classmethod
    def of(
        cls, query: Tensor, key: Tensor | BlockSummary, block: int, first_key: int, pool: int
    ) -> BlockGrid:
        """Check that everything fits together."""
        held = key.mean if isinstance(key, BlockSummary) else key
        fits = query.dim() == held.dim() == 4 and query.shape[::3] == held.shape[::3]
        if isinstance(key, BlockSummary):
            first_key, stop = key.start, key.stop
        else:
            check_whole("first_key", first_key, 0)
            stop = first_key + (key.shape[2] if fits else 0)
        if (
            not fits
            or query.shape[1] % held.shape[1]
            or not 1 <= query.shape[2] <= stop - first_key
        ):
            raise ValueError(
                "blocks: expected query [b, h, q, d] and key [b, g, k, d] or a summary of such, "
                f"received {tuple(query.shape)} and {tuple(held.shape)}; queries are the last q "
                "positions of the keys"
            )
        check_pools(block, pool)
        return cls(block, pool, first_key, stop - query.shape[2], stop)

    @property
    def before(self) -> int:
        """Key blocks before the one that the first query row lies in."""
        return self.start // self.block - self.first_key // self.block

    @property
    def key_blocks(self) -> int:
        """Blocks that hold a key."""
        return (self.stop - 1) // self.block - self.first_key // self.block + 1

    @property
    def query_blocks(self) -> int:
        """Blocks that hold a query row."""
        return self.key_blocks - self.before

    def rows(self, query_blocks: Tensor) -> Tensor:
        """Positions in the given query blocks: [n, block]."""
        first = (query_blocks + self.start // self.block) * self.block
        return first[:, None] + torch.arange(self.block, device=query_blocks.device)

    def reads(self, position: Tensor) -> Tensor:
        """Which keys, in whole blocks, rows may read: bool [rows, key blocks * block]."""
        k = torch.arange(self.key_blocks * self.block, device=position.device)
        k = k + self.first_key // self.block * self.block
        return (k <= position[:, None]) & (k >= self.first_key)

    def check(self, query_blocks: range) -> None:
        """Raise ValueError unless a range is one of query blocks side by side."""
        known = 0 <= query_blocks.start < query_blocks.stop <= self.query_blocks
        if not known or query_blocks.step != 1:
            raise bad(
                "query_blocks", f"a range of step 1 in [0, {self.query_blocks})", query_blocks,
                "Pass others as a tensor.",
            )  # fmt: skip

    def reach(self, query_blocks: Tensor | range) -> int:
        """Key blocks from the first to the last that one of the query blocks may read."""
        known = isinstance(query_blocks, range)
        return self.before + query_blocks.stop if known else self.key_blocks

    def future(self, query_blocks: Tensor | range, stop: int, device: torch.device) -> Tensor:
        """Which of ``stop`` key blocks lie in the future of query blocks: bool [n, stop]."""
        if isinstance(query_blocks, range):
            query_blocks = torch.arange(query_blocks.start, query_blocks.stop, device=device)
        own = self.before + query_blocks
        return torch.arange(stop, device=device) > own[:, None]


def check_pools(block: int, *pools: int) -> None:
    """Raise ValueError unless every pool divides the block."""
    check_whole("block", block, 1)
    for pool in pools:
        if check_whole("pool", pool, 1) and block % pool:
            raise ValueError(
                f"pool: expected a size that divides the block {block}, received {pool}"
            )
