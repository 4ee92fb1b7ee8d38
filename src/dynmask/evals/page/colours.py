"""Colours of the page, for a light and a dark screen, with contrasts that are computed."""

from __future__ import annotations

__all__ = ["LEVELS", "MARKS", "THEMES", "contrast", "ink_on", "ramp"]

Colour = tuple[int, int, int]

LEVELS = 11  # steps of a heat map, from nothing (0) to everything (10)
MARKS = 8  # colours and shapes that tell policies apart, then they start again


def rgb(text: str) -> Colour:
    """Return the colour of ``#rrggbb``."""
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)


def css(colour: Colour) -> str:
    """Return ``#rrggbb``."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


# What text and surfaces look like, the two ends of heat maps, and the colours of policies.
THEMES: dict[str, dict[str, str]] = {
    "light": {
        "page": "#f6f7f9",
        "card": "#ffffff",
        "ink": "#16191f",
        "soft": "#575e6b",
        "line": "#dde1e8",
        "accent": "#0b5fc0",
        "good": "#0f6b3f",
        "bad": "#b3261e",
        "low": "#f1f4f9",
        "high": "#123a7d",
        "full": "#16191f",
        "p0": "#0b5fc0",
        "p1": "#c2410c",
        "p2": "#0f766e",
        "p3": "#a21caf",
        "p4": "#856000",
        "p5": "#4338ca",
        "p6": "#b91c4b",
        "p7": "#3f6212",
    },
    "dark": {
        "page": "#0e1116",
        "card": "#171b22",
        "ink": "#e8ebf0",
        "soft": "#a3abb9",
        "line": "#2c333f",
        "accent": "#79b4ff",
        "good": "#63d69a",
        "bad": "#ff8f86",
        "low": "#1d222b",
        "high": "#9cc8ff",
        "full": "#e8ebf0",
        "p0": "#79b4ff",
        "p1": "#ff9a62",
        "p2": "#4fd1c0",
        "p3": "#ef8cff",
        "p4": "#e5b94a",
        "p5": "#a9abff",
        "p6": "#ff8aa8",
        "p7": "#b5d56a",
    },
}


def luminance(colour: Colour) -> float:
    """Return the relative luminance of a colour (WCAG 2.2)."""

    def linear(value: int) -> float:
        share = value / 255
        return share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4

    red, green, blue = map(linear, colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: Colour, second: Colour) -> float:
    """Return the contrast ratio of two colours, 1 to 21 (WCAG 2.2)."""
    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def ramp(theme: str, level: int) -> Colour:
    """Return the colour of a step of a heat map."""
    low, high = rgb(THEMES[theme]["low"]), rgb(THEMES[theme]["high"])
    share = level / (LEVELS - 1)
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(low, high, strict=True))
    return red, green, blue


def ink_on(colour: Colour) -> Colour:
    """Return black or white, whichever can be read better on a colour."""
    return max(((0, 0, 0), (255, 255, 255)), key=lambda ink: contrast(ink, colour))
