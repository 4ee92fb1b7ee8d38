"""Pictures of masks as PNG inside the page: one colour, as strong as a pixel is read.

Strength is transparency, so that the same picture lies on a light and on a dark page.
"""

from __future__ import annotations

import binascii
import struct
import zlib
from base64 import b64decode, b64encode

from ..reading import ABOVE, SCALE
from .markup import Html, tag

__all__ = ["image", "png"]

COLOUR = (46, 122, 235)
OUTSIDE = (128, 132, 140)
OUTSIDE_STRENGTH = 70  # of 255
ROOT = 0.45  # a diagonal one key wide is a small part of a pixel: the root makes it visible
MOST = 2**24  # bytes that a picture may unpack to


def levels(packed: str, size: int) -> bytes:
    """Return the bytes of a picture.

    Raises:
        ValueError: if they are not ``size`` bytes.
    """
    try:
        tool = zlib.decompressobj()
        data = tool.decompress(b64decode(packed, validate=True), MOST)
    except (binascii.Error, zlib.error, TypeError, ValueError) as error:
        raise ValueError(
            f"pixels: expected base64 of packed bytes, received {error}; use the report unchanged"
        ) from error
    if len(data) != size or not tool.eof:
        raise ValueError(
            f"pixels: expected {size} bytes, received {len(data)}; use the report unchanged"
        )
    return data


def png(data: bytes, rows: int, columns: int) -> bytes:
    """Return a PNG with a palette: pixels from 0 to ``SCALE``, or ``ABOVE``."""
    colours = bytes(COLOUR) * ABOVE + bytes(OUTSIDE)
    strengths = bytes(round(255 * (i / SCALE) ** ROOT) for i in range(ABOVE))
    lines = b"".join(b"\0" + data[i * columns : (i + 1) * columns] for i in range(rows))
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)),
        (b"PLTE", colours),
        (b"tRNS", strengths + bytes([OUTSIDE_STRENGTH])),
        (b"IDAT", zlib.compress(lines, 9)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, body) for name, body in parts)


def _chunk(name: bytes, body: bytes) -> bytes:
    check = zlib.crc32(name + body)
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", check)


def image(packed: str, rows: int, columns: int, alt: str) -> Html:
    """Return a picture as an element."""
    data = png(levels(packed, rows * columns), rows, columns)
    source = "data:image/png;base64," + b64encode(data).decode("ascii")
    return tag("img", src=source, alt=alt, width=columns, height=rows)
