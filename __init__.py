"""RLHF for people who already use PyTorch Lightning.

`lightning_rlhf.modules` learn, `lightning_rlhf.datamodules` feed them, `lightning_rlhf.callbacks` watch them, and
`lightning_rlhf.functional` holds the mathematics as plain tensor functions.
"""

import os

# Large tensors on pages of 2 MiB, under Linux; see docs/speed.md. torch looks at it once, before its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"
