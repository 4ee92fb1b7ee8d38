"""Token ids of a long text, window by window: the same ids, without the text in memory.

A tokenizer of transformers encodes a text on one core and holds it several times over. Here
overlapping windows are encoded a few at a time, on as many cores as there are, and stitched where
two of them agree: at a border between words of the pre-tokenizer, with equal tokens at equal
places on both sides of it. What stands before a border is the first window's, what follows the
second's. That gives the ids of the whole text for every pre-tokenizer that goes from left to right
and does not look back, which those of today's models do (their patterns look ahead, a few
characters). A tokenizer without a pre-tokenizer has no such borders: there only equal tokens
around the border are asked for, and ids may in principle differ. Windows that find no border, in a
word longer than the overlap, are encoded as one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import bad

WINDOW = 2**16
"""Characters of a window: large beside the overlap, small beside memory."""

OVERLAP = 2**11
"""Characters that two windows share: more than the longest words."""

AGREE, AGREE_ALONE = 8, 64
"""Equal tokens on each side of a border, and where nothing tells where words begin."""

TOGETHER = 16
"""Windows that are encoded at a time, by as many threads as the tokenizer has."""


class Piece(NamedTuple):
    """A window and its tokens.

    Attributes:
        start: of the window in the whole text, in characters.
        text: of the window.
        ids: of the tokens.
        spans: where each begins and ends in the window.
        words: number of its word in the window, or None.
        given: first tokens that an earlier window has told of.
    """

    start: int
    text: str
    ids: list[int]
    spans: list[tuple[int, int]]
    words: list[int | None]
    given: int = 0

    @property
    def stop(self) -> int:
        """End of the window in the whole text."""
        return self.start + len(self.text)

    def token(self, index: int) -> tuple[int, int, int]:
        """Id, begin and end, the places in the whole text."""
        first, last = self.spans[index]
        return self.ids[index], first + self.start, last + self.start


def stream_ids(
    tokenizer: Any,
    text: Iterable[str],
    *,
    special: bool = True,
    window: int = WINDOW,
    overlap: int = OVERLAP,
    heard: Callable[[int], object] | None = None,
) -> Tensor:
    """Token ids of a text that comes in parts: int64 [1, n], on the CPU.

    Args:
        tokenizer: of transformers. A slow one knows no places in the text and encodes it whole.
        text: parts of the text, of any lengths.
        special: put the tokenizer's own tokens around it, as a call of the tokenizer does.
        window: characters encoded at once.
        overlap: characters that two windows share.
        heard: called with the number of ids that each window adds.

    Raises:
        ValueError: windows that are not longer than two overlaps.
    """
    if not 0 < 2 * overlap < window:
        raise bad("stream_ids", "window > 2 overlap > 0", f"{window} and {overlap}")
    before, after = _around(tokenizer) if special else ([], [])
    if not getattr(tokenizer, "is_fast", False):
        ids = tokenizer("".join(text), add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor([before + ids + after], dtype=torch.long)
    parts = [torch.tensor(before, dtype=torch.long)]
    for ids in _stitched(tokenizer, text, window, overlap):
        parts.append(torch.tensor(ids, dtype=torch.long))
        if heard is not None:
            heard(len(ids))
    parts.append(torch.tensor(after, dtype=torch.long))
    return torch.cat(parts)[None]


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    bare, whole = (
        tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True)
    )
    for first in range(len(whole) - len(bare) + 1):
        if whole[first : first + len(bare)] == bare:
            return whole[:first], whole[first + len(bare) :]
    raise bad(
        "tokenizer", "one that puts tokens around a text", "one that changes it",
        "Tokenize the text by yourself.",
    )  # fmt: skip


def _stitched(
    tokenizer: Any, text: Iterable[str], window: int, overlap: int
) -> Iterator[list[int]]:
    """Ids, window by window."""
    words = _knows_words(tokenizer)
    held: Piece | None = None
    for windows in _batched(_windows(text, window, overlap)):
        for piece in _encode(tokenizer, windows):
            if held is None:
                held = piece
                continue
            border = _border(held, piece, words)
            if border is None:  # as one, and what was told of before is no other
                whole = held.text + piece.text[held.stop - piece.start :]
                held = _encode(tokenizer, [(held.start, whole)])[0]._replace(given=held.given)
                continue
            yield held.ids[held.given : border[0]]
            held = piece._replace(given=border[1])
    if held is not None:
        yield held.ids[held.given :]


def _encode(tokenizer: Any, windows: list[tuple[int, str]]) -> list[Piece]:
    """Tokens of windows, on several cores."""
    texts = [text for _, text in windows]
    found = tokenizer(texts, add_special_tokens=False, verbose=False).encodings
    return [
        Piece(start, text, one.ids, one.offsets, one.word_ids)
        for (start, text), one in zip(windows, found, strict=True)
    ]


def _knows_words(tokenizer: Any) -> bool:
    """Whether a pre-tokenizer splits a text into words before it is encoded."""
    return len(set(tokenizer("a b, c\nd e", add_special_tokens=False).word_ids())) > 1


def _border(left: Piece, right: Piece, words: bool) -> tuple[int, int] | None:
    """Where the left window's tokens may end and the right one's begin; None for nowhere.

    The middle of the overlap is tried first: both windows are strange to their own edges.
    """
    reach = AGREE if words else AGREE_ALONE
    middle = (right.start + left.stop) / 2 - left.start
    shared = right.start - left.start
    first = bisect_left(left.spans, (shared, 0))
    own = range(max(first, left.given, reach), len(left.ids) - reach + 1)
    place = {
        right.token(j): j
        for j in range(reach, bisect_left(right.spans, (left.stop - right.start, 0)) - reach + 1)
    }
    for i in sorted(own, key=lambda i: abs(left.spans[i][0] - middle)):
        j = place.get(left.token(i))
        if j is None or (words and not (_begins(left, i) and _begins(right, j))):
            continue
        if all(left.token(i + n) == right.token(j + n) for n in range(-reach, reach)):
            return i, j
    return None


def _begins(piece: Piece, index: int) -> bool:
    """Whether a token is the first of its word."""
    return piece.words[index] != piece.words[index - 1]


def _windows(text: Iterable[str], window: int, overlap: int) -> Iterator[tuple[int, str]]:
    """Where windows of the text begin, and what they hold."""
    rest, start, fresh = "", 0, True
    for part in text:
        rest += part
        while len(rest) >= window:
            yield start, rest[:window]
            rest, start, fresh = rest[window - overlap :], start + window - overlap, False
    if fresh or len(rest) > overlap:
        yield start, rest


def _batched(windows: Iterator[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """A few windows at a time."""
    batch: list[tuple[int, str]] = []
    for item in windows:
        batch.append(item)
        if len(batch) == TOGETHER:
            yield batch
            batch = []
    if batch:
        yield batch
