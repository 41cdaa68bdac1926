"""The trained model as a Hugging Face folder."""

from pathlib import Path

import lightning as L


class HuggingFaceExport(L.Callback):
    """Write the model with `pl_module.save_pretrained` when training has ended.

    A fit that an exception, Ctrl-C or SIGTERM ends exports nothing: Lightning then never calls `on_fit_end`, and a half
    trained model cannot pass for the finished one.

    Args:
        dirname: folder in the trainer's `default_root_dir` to write to.
    """

    def __init__(self, dirname: str = "model") -> None:
        self.dirname = dirname

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # On every rank: gathering sharded parameters takes them all. The module writes on rank zero only.
        pl_module.save_pretrained(Path(trainer.default_root_dir) / self.dirname)
