"""One thread and fixed profiles: the laws are about values, not about speed."""

import os

import torch
from hypothesis import HealthCheck, Phase, settings

# Triton reads it once, when it is first imported: without a GPU its kernels run on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)
settings.register_profile(
    "laws", deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("laws")

# Triton's interpreter takes about a second a call: few examples, and no minutes of shrinking.
INTERPRETED = settings(
    max_examples=10, phases=(Phase.explicit, Phase.reuse, Phase.generate), derandomize=False
)
