"""RLHF for people who already use PyTorch Lightning.

`lightning_rlhf.modules` learn, `lightning_rlhf.datamodules` feed them, `lightning_rlhf.callbacks` watch them, and
`lightning_rlhf.functional` holds the mathematics as plain tensor functions.
"""

__version__ = "0.1.0"
