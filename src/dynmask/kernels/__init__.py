"""Kernels: what executes a plan. They know tensors and a plan, and never each other."""
