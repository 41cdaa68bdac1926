"""The trained model as a Hugging Face folder."""

from pathlib import Path
from typing import Literal

import lightning as L


class HuggingFaceExport(L.Callback):
    """Write the model with `pl_module.save_pretrained` when training has ended.

    A fit that an exception, Ctrl-C or SIGTERM ends exports nothing: Lightning then never calls `on_fit_end`, and a half
    trained model cannot pass for the finished one.

    Args:
        dirname: folder in the trainer's `default_root_dir` to write to.
        lora: of a module with LoRA: `merged` writes a whole model, `adapter` only the adapter, for peft.
    """

    def __init__(self, dirname: str = "model", lora: Literal["merged", "adapter"] = "merged") -> None:
        self.dirname, self.lora = dirname, lora

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and self.lora == "adapter" and not pl_module.hparams.get("lora_r"):
            raise ValueError("`HuggingFaceExport(lora=adapter)`: there will be no adapter, because `lora_r` is 0.")
        if stage == "fit" and self.lora == "merged" and pl_module.hparams.get("load_in_4bit"):
            raise ValueError(
                "`HuggingFaceExport(lora=merged)`: with `load_in_4bit` there will be no weights that an adapter could "
                "be merged into. Set `lora: adapter`."
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # On every rank: gathering sharded parameters takes them all. The module writes on rank zero only.
        options = {} if self.lora == "merged" else {"merge": False}
        pl_module.save_pretrained(Path(trainer.default_root_dir) / self.dirname, **options)
