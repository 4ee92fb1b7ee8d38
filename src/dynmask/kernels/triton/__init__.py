"""Triton kernels: selection, lowering, prefill and decoding on a GPU. Needs the triton package.

Under ``TRITON_INTERPRET=1`` the same kernels run on CPU tensors, slowly: that is how they are
tested where there is no GPU.
"""
