"""How errors about arguments are worded."""

from __future__ import annotations


def bad(what: str, expected: object, received: object, remedy: str = "") -> ValueError:
    """A ValueError that says what was expected, what was received, and what to do."""
    return ValueError(f"{what}: expected {expected}, received {received}. {remedy}".rstrip())
