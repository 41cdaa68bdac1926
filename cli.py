"""The commands that need Lightning: those of the Trainer, `export` and `workspace`.

LightningCLI with errors of a few lines and this project's defaults for checkpoints, loggers, callbacks and a run's
folder. To import it takes seconds: `train.py`, where a command line begins, does so only for these commands.
"""

import difflib
import inspect
import os
import re
import sys
import warnings
from pathlib import Path
from pydoc import locate
from typing import Any, NoReturn, get_args, get_type_hints

import datasets
import lightning as L
import transformers
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from . import callbacks, datamodules, modules
from .callbacks import (
    ALARMS,
    HuggingFaceExport,
    JSONLinesWriter,
    Preemption,
    ProgressBar,
    Provenance,
    Reliability,
    RNGState,
    RunCheckpoint,
    RunReport,
    SampleTable,
    StageSummary,
    Throughput,
    TokenView,
    ValidationSamples,
    WandbAxes,
)
from .checkpointing import AtomicCheckpointIO, recover
from .commands import COMMANDS
from .export import export
from .failures import NoteFailure
from .loggers import MetricsFile, close_wandb, forgiving
from .wandb_workspace import make_workspace

# Importing them makes their short names known to the parser.
SHIPPED = {
    "model": [name for name in modules.__all__ if name != "TextModule"],
    "data": [name for name in datamodules.__all__ if name != "TextDataModule"],
    "trainer.callbacks": [name for name in callbacks.__all__ if name not in ("Alarm", "MetricAlarm")],
}


class SaveFitConfig(SaveConfigCallback):
    """config.yaml is the configuration of the training; a later `validate` in the same folder leaves it alone."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Save in `fit` only."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class Parser(LightningArgumentParser):
    """A parser whose errors are a few lines: what is wrong, and what would be right."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """jsonargparse prints all flags before the message, and how it tried to read the value after it."""
        if not self.exit_on_error:  # a parser within the parser
            super().error(message, ex)
        lines = re.sub(r"\n *Given value: (NestedArg|Namespace).*", "", message, flags=re.DOTALL).splitlines()
        noise = ("Does not validate", "Subtypes:", "Errors:", "Expected a <class 'NoneType'>", "Given value type:")
        shown = [line for line in lines if line.strip() and not line.strip(" -").startswith(noise)]
        sys.stderr.write("\n".join(["error: " + shown[0], *shown[1:], *hints(message, ex, self)]) + "\n")
        self.exit(2)


def hints(message: str, ex: Exception | None, parser: LightningArgumentParser) -> list[str]:
    """What would have been accepted."""
    if found := re.search(r"class_path '([\w.]+)':\s+Option '(\w+)' is not accepted", message):
        arguments = LightningArgumentParser()
        arguments.add_class_arguments(locate(found[1]))
        return _accepted(found[2], sorted(arguments.get_defaults().keys()))
    if found := re.search(r"(?:unrecognized arguments: --|does not accept option ')([\w.]+)", message):
        flags = getattr(ex, "subcommand_parser", parser)._option_string_actions
        return _did_you_mean("--" + found[1], list(flags))
    if found := re.search(r'.*Parser key "([\w.]+)":.*Expected a dot import path string: (\S+)', message, re.DOTALL):
        owner = re.search(r"given class_path '([\w.]+)'", message)
        known = SHIPPED.get(found[1]) or (_classes_for(locate(owner[1]), found[1]) if owner else [])
        return _accepted(found[2], known) if known else []
    return []


def _classes_for(owner: type, argument: str) -> list[str]:
    """Names of the classes that a constructor's argument takes."""
    annotations = {k: v for c in reversed(owner.__mro__) for k, v in get_type_hints(c.__init__).items()}
    found = [kind for kind in get_args(annotations.get(argument)) if inspect.isclass(kind)]
    for kind in found:
        found += kind.__subclasses__()  # while it is iterated over: theirs, too
    return sorted({kind.__name__ for kind in found if not inspect.isabstract(kind) and kind is not type(None)})


def _accepted(word: str, names: list[str]) -> list[str]:
    return [*_did_you_mean(word, names), "  accepted: " + ", ".join(names)]


def _did_you_mean(word: str, known: list[str]) -> list[str]:
    return [f"  did you mean {match}?" for match in difflib.get_close_matches(word, known, n=1)]


class CLI(LightningCLI):
    """LightningCLI with this project's defaults for checkpoints, loggers and the run's folder."""

    def _parse_ckpt_path(self) -> None:
        """Do nothing: in Lightning, what a checkpoint says wins over the flags, even over which `--model` it is."""

    def setup_parser(self, *args: Any) -> None:
        """Errors list the other commands, too; these never come to this parser."""
        super().setup_parser(*args)
        for name in [name for name in COMMANDS if name not in self.subcommands()]:
            self.parser._subcommands_action.add_subcommand(name, Parser(), help=COMMANDS[name])

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """`--checkpoint.*` are ModelCheckpoint's arguments."""
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.save_last": True,
                "checkpoint.filename": "{epoch}-{step}",
                # By default Lightning saves where it validates: with validation every 50 epochs, every 50 epochs.
                "checkpoint.save_on_train_epoch_end": True,
            }
        )

    def before_instantiate_classes(self) -> None:
        """Everything of a run goes to `--trainer.default_root_dir`; by default runs/<the module's name>."""
        config = self.config[self.subcommand]
        if str(config.trainer.strategy).startswith(("fsdp_", "deepspeed")) or config.trainer.strategy == "fsdp":
            raise ValueError(
                f"`--trainer.strategy {config.trainer.strategy}` is not supported: for sharded weights use `fsdp2`."
            )
        name = config.model.class_path.rpartition(".")[2]
        root = Path(config.trainer.default_root_dir or Path("runs") / name)
        config.trainer.default_root_dir = str(root)
        config.trainer.logger = None if config.trainer.logger is True else config.trainer.logger
        if config.weights_only is None:  # Lightning would unpickle a checkpoint that comes from a URL
            config.weights_only = True

    def instantiate_classes(self) -> None:
        """A constructor's complaint as it is, without the parser's account of what it tried to build."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            if error.__cause__ is None or not str(error).startswith("Does not validate against"):
                raise
            raise error.__cause__ from None

    def after_fit(self) -> None:
        """Write out the W&B run now; at the end of the process it may be too late."""
        close_wandb(self.trainer.loggers)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The CSV logger is always there; W&B unless other loggers, or none, are asked for."""
        asked = self._get(self.config_init, "trainer").logger
        root = Path(self._get(self.config_init, "trainer").default_root_dir)
        checkpoint = self._get(self.config_init, "checkpoint")
        if checkpoint.dirpath is None:  # not in the config: a saved one may be run again in another folder
            checkpoint.dirpath = os.path.realpath(root / "checkpoints")
        loggers = [csv_logger(root if self.subcommand == "fit" else root / self.subcommand)]
        if asked is None and self.subcommand == "fit":
            loggers.append(wandb_logger(root))
        elif asked:
            loggers += map(forgiving, asked if isinstance(asked, list) else [asked])
        plugins = self._get(self.config_init, "trainer").plugins or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins = [*plugins, AtomicCheckpointIO()]
        if self.subcommand == "fit":
            rank_zero_only(recover)(Path(checkpoint.dirpath))
        self._choose_callbacks()
        return self._refuse_other_precision(super().instantiate_trainer(logger=loggers, plugins=plugins, **kwargs))

    def _refuse_other_precision(self, trainer: L.Trainer) -> L.Trainer:
        asked = str(self._get(self.config_init, "trainer").precision)
        if asked in ("16", "16-mixed") and trainer.precision != "16-mixed":
            raise ValueError("`--trainer.precision 16-mixed` needs a GPU; on a CPU use `bf16-mixed`.")
        return trainer

    def _choose_callbacks(self) -> None:
        """What the user names takes the place of the default of its class, in the order of the defaults.

        A progress bar or ModelCheckpoint among the callbacks is an error where the Trainer's flag says none.
        """
        trainer = self._get(self.config_init, "trainer")
        asked = trainer.callbacks or []
        asked = asked if isinstance(asked, list) else [asked]
        named = {type(callback): callback for callback in asked}
        kept = [named.get(type(default), default) for default in self.trainer_defaults["callbacks"]]
        trainer.callbacks = [callback for callback in asked if callback not in kept]
        if trainer.enable_progress_bar is False:
            kept = [c for c in kept if not isinstance(c, ProgressBar)]
        self.trainer_defaults["callbacks"] = kept
        if trainer.enable_checkpointing is False:
            self._parser(self.subcommand).callback_keys.remove("checkpoint")


def csv_logger(folder: Path) -> Logger:
    """metrics.csv in the folder; one that is already there is kept under another name."""
    metrics = folder / "metrics.csv"
    if metrics.exists() and os.environ.get("LOCAL_RANK", "0") == "0":
        earlier = sum(1 for _ in folder.glob("metrics_*.csv"))
        metrics.rename(folder / f"metrics_{earlier}.csv")
    warnings.filterwarnings("ignore", message=r"Experiment logs directory .* exists and is not empty")
    return forgiving(MetricsFile(folder))


def wandb_logger(root: Path) -> Logger:
    """A W&B run that needs no account: without credentials it is written to disk, to be uploaded when you like."""
    root.mkdir(parents=True, exist_ok=True)
    offline = os.environ.get("WANDB_MODE", "offline" if not _has_wandb_credentials() else "online") != "online"
    if offline:
        rank_zero_info(f"W&B runs offline: its files are in {root / 'wandb'}; upload them with `wandb sync`.")
    # Its service may have been started in another directory.
    where = root.resolve()
    return forgiving(WandbLogger(name=root.name, project="lightning-rlhf", save_dir=where, offline=offline))


def _has_wandb_credentials() -> bool:
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and "wandb" in netrc.read_text())


def default_callbacks() -> list[L.Callback]:
    """What watches, keeps and reports every run."""
    return [
        Provenance(),  # first: it notes it, too, when another fails
        ProgressBar(),
        SampleTable(),
        ValidationSamples(),
        TokenView(),
        Reliability(),
        WandbAxes(),
        Throughput(),
        HuggingFaceExport(),
        RNGState(),
        Preemption(),
        JSONLinesWriter(),
        *(alarm() for alarm in ALARMS),
        StageSummary(),
        RunReport(),  # last: of the files that the others wrote
        NoteFailure(),
    ]


def export_parser() -> Parser:
    """The flags of `export` are its arguments."""
    parser = Parser(prog="train.py export", description=COMMANDS["export"])
    parser.add_function_arguments(export)
    return parser


def workspace_parser() -> Parser:
    """The flags of `workspace`."""
    parser = Parser(prog="train.py workspace", description=COMMANDS["workspace"])
    parser.add_argument("--project", default="lightning-rlhf", help="the runs' project in W&B")
    parser.add_argument("--entity", default=None, help="the user or team that has it; your default one if left out")
    parser.add_argument("--report", action="store_true", help="save a report with the same panels, too")
    return parser


def export_and_tell(**flags: Any) -> None:
    """Write a checkpoint's model, and say where it is."""
    export(**flags)
    rank_zero_info(f"The model is in {flags['folder']}")


NOT_THE_TRAINERS = {
    "export": (export_parser, export_and_tell),
    "workspace": (workspace_parser, make_workspace),
}
"""The flags of a command, and what is called with them."""


def run(args: list[str] | None = None) -> CLI | None:
    """Parse a command line, this process's if none is given, and run it."""
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`")  # Lightning's way to call torch
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # a new head is reported as a table of missing weights
    datasets.disable_progress_bars()
    given = sys.argv[1:] if args is None else args
    if given and given[0] in NOT_THE_TRAINERS:
        parser, command = NOT_THE_TRAINERS[given[0]]
        command(**parser().parse_args(given[1:]))
        return None
    return CLI(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_class=Parser,
        seed_everything_default=0,
        save_config_callback=SaveFitConfig,
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
        trainer_defaults={"callbacks": default_callbacks()},
        args=args,
    )
