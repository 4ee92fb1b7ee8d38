"""Keys that are kept but rarely read lie on the host, and are copied where a token reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .masks import LifetimeMask
from .pooled_keys import PooledKeys
from .slots import FEWEST_SLOTS, Rows

INF = LifetimeMask.INF

_streams: dict[torch.device, torch.cuda.Stream] = {}


class HostedStore(Rows):
    """The kv heads of a layer whose keys and values lie in host memory, by position.

    Pools of the keys stay on the device: they say which blocks a token reads, and those alone are
    copied (:meth:`fetch`). New keys go to the host on a stream of their own, so that the device
    goes on computing meanwhile; host memory is pinned where there is CUDA. On a CPU host and
    device are the same memory, and what is kept and read is too.

    Args:
        pools: summaries of the keys, of all heads of the store.
        block: keys that are copied together.
        room: tokens of a row that memory is taken for at once, at least.
    """

    def __init__(self, pools: PooledKeys, block: int, room: int = 0) -> None:
        self.pools = pools
        self.block = block
        self.room = room
        self._written: Any = None
        """When the last copy to the host is done: an event of the copying stream, or None."""
        super().__init__()

    def reset(self) -> None:
        """Forget every key, the batch size too."""
        super().reset()
        self.pools.reset()
        self._written, self._device = None, torch.device("cpu")

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that stay on the device."""
        return self.pools.nbytes

    @property
    def host_nbytes(self) -> int:
        """Bytes of the tensors on the host."""
        return super().nbytes

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.seen)

    def check_fit(self, key: Tensor, value: Tensor) -> None:
        """Raise ValueError unless new keys [b, g, n, d] and values are of the kind of the old."""
        if self._device == key.device == value.device:
            key, value = (x[:, :, :0].cpu() for x in (key, value))
        super().check_fit(key, value)

    # what goes to the host

    def extend(self, key: Tensor, value: Tensor, runs: dict[int, tuple[int, int]]) -> None:
        """Keep new keys.

        Args:
            key: [b, g, n, d], of the new tokens, on the device.
            value: [b, g, n, dv].
            runs: for each batch row that has some its tokens, from and to; the rest is padding.
        """
        with torch.no_grad():
            if not self._tensors:
                self._start(key, value)
            before = list(self.seen)
            for row, (start, stop) in runs.items():
                self.seen[row] += stop - start
            self._reserve(self.longest)
            self.pools.extend(key, runs)
            self._write((key.contiguous(), value.contiguous()), before, runs)

    def _write(
        self, new: tuple[Tensor, Tensor], before: list[int], runs: dict[int, tuple[int, int]]
    ) -> None:
        """Copy tokens to their places; on CUDA nothing waits for it but who reads the host."""
        stream = _stream(self._device)
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for kept, x in zip((self.keys, self.values), new, strict=True):
                for row, (start, stop) in runs.items():
                    own = slice(before[row], self.seen[row])
                    for head in range(x.shape[1]):  # each in one piece, or it would not be async
                        kept[row, head, own].copy_(x[row, head, start:stop], non_blocking=True)
                if stream is not None:
                    x.record_stream(stream)
        if stream is not None:
            self._written = stream.record_event()

    # what comes back

    def held(self) -> tuple[Tensor, Tensor]:
        """All keys and values on the device, for one call of many tokens: [b, g, longest, d]."""
        if self._device.type == "cpu":
            return self.keys[:, :, : self.longest], self.values[:, :, : self.longest]
        if self._written is not None:
            torch.cuda.current_stream(self._device).wait_event(self._written)
        made = []
        for kept in (self.keys, self.values):
            batch, heads, _, dim = kept.shape
            out = torch.empty(
                batch, heads, self.longest, dim, dtype=kept.dtype, device=self._device
            )
            for row in range(batch):
                for head in range(heads):
                    out[row, head].copy_(kept[row, head, : self.longest], non_blocking=True)
            made.append(out)
        return made[0], made[1]

    def fetch(self, seen: Tensor) -> tuple[Tensor, Tensor, LifetimeMask]:
        """What the newest token of each row reads: keys, values [b, g, n, d] and their mask.

        Whole blocks are copied, for each kv head those that one of its query heads reads; each
        query head still reads its own keys among them. Waits for the device: the host must know
        which blocks.

        Args:
            seen: which keys each query head reads, bool [b, h, longest], on the device.
        """
        (_, heads, keys), groups, size = seen.shape, self.keys.shape[1], self.block
        seen = torch.nn.functional.pad(seen, (0, -keys % size)).unflatten(-1, (-1, size))
        wanted = seen.any(-1).unflatten(1, (groups, -1)).any(2).cpu()
        self.wait()
        most = max(int(wanted.sum(-1).max()), 1)
        block = wanted.byte().argsort(dim=-1, descending=True, stable=True)[..., :most]
        key, value = (self._blocks(x, block) for x in (self.keys, self.values))
        index = block.to(seen.device, non_blocking=True).repeat_interleave(heads // groups, 1)
        own = seen.gather(2, index[..., None].expand(-1, -1, -1, size)).flatten(2)
        return key, value, LifetimeMask(own.int() * INF, 1, most=own.shape[-1])

    def _blocks(self, kept: Tensor, block: Tensor) -> Tensor:
        """Blocks [b, g, n] of what is kept, on the device: [b, g, n * size, d]."""
        batch, groups, room, dim = kept.shape
        each = room // self.block
        first = torch.arange(batch * groups).view(batch, groups, 1) * each
        rows = kept.view(batch * groups * each, self.block * dim)
        shape = (block.numel(), rows.shape[1])
        out = torch.empty(shape, dtype=kept.dtype, pin_memory=self._pinned)
        torch.index_select(rows, 0, (first + block).flatten(), out=out)
        return out.to(self._device, non_blocking=True).view(batch, groups, -1, dim)

    def wait(self) -> None:
        """Until what was given is on the host."""
        if self._written is not None:
            self._written.synchronize()
            self._written = None

    # the rows of a batch, going back

    def reorder(self, index: Tensor | Sequence[int]) -> None:
        """Batch row i becomes what row ``index[i]`` was."""
        self.wait()
        if self._pinned:  # rows move on the host at once: nothing may be on its way from there
            torch.cuda.current_stream(self._device).synchronize()
        super().reorder(index.cpu() if isinstance(index, Tensor) else index)
        for name, x in self._tensors.items():
            if self._pinned and not x.is_pinned():
                self._tensors[name] = x.pin_memory()
        self.pools.reorder(index)

    def crop(self, tokens: int) -> None:
        """Forget the newest ``tokens`` tokens of every row."""
        self.wait()
        self.seen = [max(seen - tokens, 0) for seen in self.seen]

        def read(row: int, start: int, stop: int) -> Tensor:
            return self.keys[row, :, start:stop].to(self._device)

        self.pools.crop(tokens, read)

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which know nothing of the stream."""
        self.wait()
        return self.__dict__

    # memory

    @property
    def _pinned(self) -> bool:
        """Whether the host memory is such that copies need not wait."""
        return self._device.type == "cuda"

    def _start(self, key: Tensor, value: Tensor) -> None:
        """No keys yet."""
        self.seen, self._device = [0] * len(key), key.device
        for name, x in (("keys", key), ("values", value)):
            self._tensors[name] = self._empty(*x.shape[:2], 0, x.shape[3], dtype=x.dtype)

    def _empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory of the host."""
        with torch.inference_mode(False):
            return torch.zeros(shape, dtype=dtype, pin_memory=self._pinned)

    def _reserve(self, tokens: int) -> None:
        """Room for so many tokens a row, in whole blocks."""
        old = self.keys.shape[2]
        if tokens <= old:
            return
        self.wait()
        size = max(tokens, self.room) + max(FEWEST_SLOTS, tokens // 16)
        size += -size % self.block
        for name, x in self._tensors.items():
            new = self._empty(*x.shape[:2], size, x.shape[3], dtype=x.dtype)
            new[:, :, :old] = x
            self._tensors[name] = new


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    """The stream on which keys go to the host; None where there is no CUDA."""
    if device.type != "cuda":
        return None
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


__all__ = ["HostedStore"]
