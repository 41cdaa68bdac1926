"""What a command line can say: the commands in a line each, and those of them that are quick.

`--help` and `report` import neither PyTorch nor Lightning, and answer in less than a second; `cli.py` has the others.
"""

import argparse
from typing import NoReturn

COMMANDS = {
    "fit": "Train a module.",
    "validate": "Report a module's metrics on held-out data.",
    "test": "The same on the rows of the test split.",
    "predict": "Write a module's completions or scores as JSON lines.",
    "export": "Write a checkpoint's model as a Hugging Face folder: weights, config, tokenizer and model card.",
    "report": "The page of a run, or a comparison of several, as HTML.",
    "workspace": "Save a view of a W&B project, and a report on it.",
}
"""Every command, in the order of the help."""


class QuickParser(argparse.ArgumentParser):
    """Its errors are a line, as those of the other commands' parsers."""

    def error(self, message: str) -> NoReturn:
        """Leave, with the exit code of wrong usage."""
        self.exit(2, f"error: {message}\n")


def show_help(given: list[str]) -> None:
    """Print the list of commands."""
    parser = QuickParser(
        description="RLHF with PyTorch Lightning.",
        epilog="All flags with their values: `fit --model PPOModule --data PromptDataModule --print_config`. "
        "What a module's flags mean: `fit --model.help PPOModule`.",
    )
    parser.add_argument("-c", "--config", help="a YAML file with a section for each subcommand")
    parser.add_argument("--print_config", metavar="[=flags]", help="print the configuration of a command, and exit")
    commands = parser.add_subparsers(title="subcommands", description="`fit --help` lists the flags of `fit`.")
    for name, help_text in COMMANDS.items():
        commands.add_parser(name, help=help_text)
    parser.print_help()
    parser.exit()


def report(given: list[str]) -> None:
    """The page of a run, or of several."""
    from .report import main_report  # numpy and jinja2, of which the help has no need

    parser = QuickParser(prog="train.py report", description=COMMANDS["report"], allow_abbrev=False)
    parser.add_argument("folders", nargs="+", help="folders of runs, or a folder that holds some")
    parser.add_argument("--output", help="where the comparison goes")
    main_report(**vars(parser.parse_args(given)))


QUICK = {"-h": show_help, "--help": show_help, "report": report}
"""What is called with the rest of a command line that begins so."""
