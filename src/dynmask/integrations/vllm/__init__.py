"""Sparse attention in vLLM: a plugin that vLLM finds by its entry point.

vLLM calls :func:`register` in every process. On NVIDIA GPUs the backend is taken where it is asked
for (``--attention-backend CUSTOM``) and stands on vLLM's own FlashAttention backend, which computes
whatever is read whole. On a CPU, where vLLM lets nobody choose, it is taken when the environment
names a card or a policy. Importing this package imports nothing of vLLM. ``docs/serving.md``.
"""

from __future__ import annotations

import os

BACKEND = "CUSTOM"
"""Name of the backend for ``--attention-backend``."""

_HERE = "dynmask.integrations.vllm"


def register() -> None:
    """Tell vLLM of the backend; the entry point ``vllm.general_plugins``."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from .checks import OWN_SCORES
    from .settings import CARD, POLICY

    cuda = current_platform.is_cuda()
    path = f"{_HERE}.flash.FlashBackend" if cuda else f"{_HERE}.backend.PagedBackend"
    register_backend(AttentionBackendEnum[BACKEND], path)
    if current_platform.is_cpu() and (os.environ.get(CARD) or os.environ.get(POLICY)):
        # the CPU platform takes its own backend whatever was asked for, through this table
        register_backend(AttentionBackendEnum.CPU_ATTN, path)
    if os.environ.get(POLICY) == OWN_SCORES:
        from .converted import register_loader

        register_loader()


__all__ = ["BACKEND", "register"]
