"""What is kept of the keys of each block, as state that grows chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .masks.base import check_whole
from .retention import at_least_float32

NUMBERS_AT_A_TIME = 2**24
"""Numbers in float32 that are held at a time, beside results: 64 MiB."""


@dataclass(frozen=True, eq=False)
class BlockSummary:
    """What is kept of the keys of each block: how many, their mean, and how far they lie from it.

    Chunk by chunk or at once, the summary is the same up to rounding, which makes it the state of
    chunked prefill and decoding. Tensors are float32 (float64 for float64 keys).

    Args:
        count: [blocks], keys in each block; only the first and the last may be short.
        mean: [b, g, blocks, d].
        spread: sums of the squared differences from the mean, [b, g, blocks, d].
        block: positions in a block.
        start, stop: positions of the first key and after the last.
        wider: the same keys in wider blocks, where somebody has made that already.
    """

    count: Tensor
    mean: Tensor
    spread: Tensor
    block: int
    start: int
    stop: int
    wider: BlockSummary | None = None

    @classmethod
    def of(cls, key: Tensor, block: int, start: int = 0) -> BlockSummary:
        """Summary of keys [b, g, k, d], the first of which has position ``start``."""
        check_whole("block", block, 1)
        check_whole("start", start, 0)
        if key.dim() != 4 or not key.numel():
            raise ValueError(f"key: expected some of [b, g, k, d], received {tuple(key.shape)}")
        batch, groups, keys, dim = key.shape
        stop = start + keys
        step = max(NUMBERS_AT_A_TIME // (batch * groups * dim * block), 1) * block
        cuts = [*range(start - start % block + step, stop, step), stop]
        means, spreads, first = [], [], start
        for last in cuts:
            part = in_blocks(
                at_least_float32(key[:, :, first - start : last - start]), first, block
            )
            held = held_of(first, last, block, key.device)
            mean = part.sum(3) / held.sum(-1)[:, None]
            apart = (part - mean[..., None, :]).masked_fill(~held[..., None], 0)
            means.append(mean)
            spreads.append(apart.square().sum(3))
            first = last
        count = held_of(start, stop, block, key.device).sum(-1).to(means[0].dtype)
        return cls(count, torch.cat(means, 2), torch.cat(spreads, 2), block, start, stop)

    def update(self, key: Tensor, start: int) -> BlockSummary:
        """The summary with the keys [b, g, k, d] that follow, from position ``start`` on."""
        if start != self.stop:
            raise ValueError(
                f"start: expected {self.stop}, the position after the keys that are summarised, "
                f"received {start}; pass chunks one after the other"
            )
        if key.shape[:2] + key.shape[3:] != self.mean.shape[:2] + self.mean.shape[3:]:
            raise ValueError(
                f"key: expected [b, g, k, d] like the summary {tuple(self.mean.shape)}, received "
                f"{tuple(key.shape)}"
            )
        new = BlockSummary.of(key, self.block, start)
        count, mean, spread = self.count, self.mean, self.spread
        if start % self.block:  # the block that both have keys of
            old_n, new_n = count[-1:], new.count[:1]
            share = new_n / (old_n + new_n)
            apart = new.mean[:, :, :1] - mean[:, :, -1:]
            new.count[:1] += old_n
            new.spread[:, :, :1] += spread[:, :, -1:] + apart.square() * old_n * share
            new.mean[:, :, :1] = mean[:, :, -1:] + apart * share
            count, mean, spread = count[:-1], mean[:, :, :-1], spread[:, :, :-1]
        return BlockSummary(
            torch.cat([count, new.count]),
            torch.cat([mean, new.mean], 2),
            torch.cat([spread, new.spread], 2),
            self.block,
            self.start,
            new.stop,
        )

    @property
    def variance(self) -> Tensor:
        """Variance of the keys of each block: [b, g, blocks, d]."""
        return self.spread / self.count[:, None]

    def coarser(self, block: int) -> BlockSummary:
        """The summary in blocks of ``block``, a multiple of the present size."""
        if block == self.block:
            return self
        if self.wider is not None and self.wider.block == block:
            return self.wider
        if block % self.block:
            raise ValueError(f"block: expected a multiple of {self.block}, received {block}")
        first = self.start // self.block

        def whole(x: Tensor) -> Tensor:
            return in_blocks(x, first, block // self.block)

        part = whole(self.count[None, None, :, None])[0, 0]
        count = part.sum(1)
        mean = (whole(self.mean) * part).sum(3) / count
        apart = (whole(self.mean) - mean[..., None, :]).square() * part
        spread = (whole(self.spread) + apart).sum(3)
        return BlockSummary(count[:, 0], mean, spread, block, self.start, self.stop)


def in_blocks(x: Tensor, first: int, block: int) -> Tensor:
    """Positions [.., n, d] from ``first`` on, in whole blocks [.., blocks, block, d]; 0 outside."""
    front = first % block
    back = -(front + x.shape[-2]) % block
    if front or back:
        x = nn.functional.pad(x, (0, 0, front, back))
    return x.unflatten(-2, (-1, block))


def held_of(first: int, stop: int, block: int, device: torch.device) -> Tensor:
    """Which positions of the blocks around [first, stop) lie in it: bool [blocks, block]."""
    low = first - first % block
    position = torch.arange(low, stop + -stop % block, device=device)
    return ((position >= first) & (position < stop)).view(-1, block)
