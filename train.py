"""The command line: `python train.py fit --config configs/demo/ppo.yaml`, or `lightning-rlhf fit ...`.

Subcommands are the Trainer's own: fit, validate, test, predict. `--model PPOModule` and `--data PromptDataModule`
choose the classes, whose constructor arguments are the flags; `--print_config` prints every value of a run. Three more:
`export` writes a checkpoint's model as a Hugging Face folder, `report` a page on one run or several, and `workspace`
saves a view of a Weights & Biases project.

It begins here. `commands.py` has what is quick, `cli.py` the rest, which is imported only when it is asked for.
"""

import contextlib
import gc
import sys
from typing import TYPE_CHECKING

from lightning_rlhf.commands import QUICK

if TYPE_CHECKING:
    from lightning_rlhf.cli import CLI


def main(args: list[str] | None = None) -> "CLI | None":
    """Run this process's command line; or `args`, for callers in Python: those get exceptions, and the CLI object."""
    if args is not None:
        return run(args)
    if len(sys.argv) > 1 and sys.argv[1] in QUICK:
        with contextlib.suppress(Exception):  # it comes again below, where `guard` tells it
            return run()
    import_the_rest()
    from lightning_rlhf.failures import guard

    guard(run)
    return None  # what a console script returns is its exit code


def import_the_rest() -> None:
    """Import what takes seconds, a fifth less than by itself.

    The imports make a million objects, and nearly all of them stay: Python is kept from looking for garbage among them
    again and again, now and (`freeze`) later.
    """
    gc.disable()
    from lightning_rlhf import cli as cli

    gc.freeze()
    gc.enable()


def run(args: list[str] | None = None) -> "CLI | None":
    """Parse a command line, this process's if none is given, and run it."""
    given = sys.argv[1:] if args is None else args
    if given and given[0] in QUICK:
        QUICK[given[0]](given[1:])
        return None
    from lightning_rlhf import cli

    return cli.run(args)


if __name__ == "__main__":
    main()
