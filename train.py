"""The command line: `python train.py fit --config configs/demo/ppo.yaml`, or `lightning-rlhf fit ...`.

Subcommands are the Trainer's own: fit, validate, test, predict. `--model PPOModule` and `--data PromptDataModule`
choose the classes, whose constructor arguments are the flags; `--print_config` prints every value of a run.
"""

import os
import warnings
from pathlib import Path
from typing import Any

import datasets
import lightning as L
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info

from lightning_rlhf import datamodules, modules
from lightning_rlhf.callbacks import (
    HuggingFaceExport,
    JSONLinesWriter,
    ProgressBar,
    RNGState,
    SampleTable,
    StageSummary,
)

SHIPPED = [*modules.__all__, *datamodules.__all__]  # importing them makes their short names known to the parser


class SaveFitConfig(SaveConfigCallback):
    """config.yaml is the configuration of the training; a later `validate` in the same folder leaves it alone."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Save in `fit` only."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class CLI(LightningCLI):
    """LightningCLI with this project's defaults for checkpoints, loggers and the run's folder."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """`--checkpoint.*` are ModelCheckpoint's arguments."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.filename": "{epoch}-{step}"})

    def before_instantiate_classes(self) -> None:
        """Everything of a run goes to `--trainer.default_root_dir`; by default runs/<the module's name>."""
        config = self.config[self.subcommand]
        name = config.model.class_path.rpartition(".")[2]
        root = Path(config.trainer.default_root_dir or Path("runs") / name)
        config.trainer.default_root_dir = str(root)
        config.trainer.logger = None if config.trainer.logger is True else config.trainer.logger
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = str(root / "checkpoints")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The CSV logger is always there; W&B unless other loggers, or none, are asked for."""
        asked = self._get(self.config_init, "trainer").logger
        root = Path(self._get(self.config_init, "trainer").default_root_dir)
        loggers = [csv_logger(root if self.subcommand == "fit" else root / self.subcommand)]
        if asked is None and self.subcommand == "fit":
            loggers.append(wandb_logger(root))
        elif asked:
            loggers += asked if isinstance(asked, list) else [asked]
        return super().instantiate_trainer(logger=loggers, **kwargs)


def csv_logger(folder: Path) -> CSVLogger:
    """metrics.csv in the folder; one that is already there is kept under another name."""
    metrics = folder / "metrics.csv"
    if metrics.exists() and os.environ.get("LOCAL_RANK", "0") == "0":
        earlier = sum(1 for _ in folder.glob("metrics_*.csv"))
        metrics.rename(folder / f"metrics_{earlier}.csv")
    warnings.filterwarnings("ignore", message=r"Experiment logs directory .* exists and is not empty")
    return CSVLogger(folder.parent, name=folder.name, version="")


def wandb_logger(root: Path) -> Logger:
    """A W&B run that needs no account: without credentials it is written to disk, to be uploaded when you like."""
    root.mkdir(parents=True, exist_ok=True)
    offline = os.environ.get("WANDB_MODE", "offline" if not _has_wandb_credentials() else "online") != "online"
    if offline:
        rank_zero_info(f"W&B runs offline: its files are in {root / 'wandb'}; upload them with `wandb sync`.")
    return WandbLogger(name=root.name, project="lightning-rlhf", save_dir=root, offline=offline)


def _has_wandb_credentials() -> bool:
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and "wandb" in netrc.read_text())


def main(args: list[str] | None = None) -> CLI:
    """Parse the command line and run it."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # a new head is reported as a table of missing weights
    datasets.disable_progress_bars()
    return CLI(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_callback=SaveFitConfig,
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
        trainer_defaults={
            "callbacks": [
                ProgressBar(),
                SampleTable(),
                HuggingFaceExport(),
                RNGState(),
                JSONLinesWriter(),
                StageSummary(),
            ]
        },
        args=args,
    )


if __name__ == "__main__":
    main()
