"""Seconds from a command to its answer, and from `train.py fit` to the first batch of a training.

    python benchmarks/startup.py --repetitions 5

Each is a process of its own, on one thread; they take turns, and the first turn is not counted. Medians: seconds on the
clock, and CPU seconds (user and system), which depend less on what else the machine does. A training's end where its
first batch begins; what W&B does in its own process is not in its CPU seconds. Some 4 minutes on 2 cores.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import lightning as L
from capacity import table
from model_shapes import Shape
from small_llama import make_texts, write_models

TRAIN = str(Path(__file__).parents[1] / "train.py")
TINY = Shape(layers=2, hidden=32, heads=4, kv_heads=2, head_dim=8, intermediate=64, vocabulary=128)
FLOOR = "import torch, lightning.pytorch.cli, transformers.modeling_utils, peft, datasets"
IMPORTS = [
    "import torch",
    "import lightning",
    FLOOR,
    "from lightning_rlhf import modules, datamodules, callbacks",
]
ANSWERS = [["--help"], ["report", "--help"], ["export", "--help"], ["fit", "--help"]]
FIT = ["fit", "--model=SFTModule", "--data=SFTDataModule", "--data.data=texts.jsonl", "--data.batch_size=2"]
FIT += ["--model.model=policy", "--trainer.max_steps=1", "--trainer.accelerator=cpu", "--trainer.devices=1"]


class Seconds(NamedTuple):
    """What a process took."""

    clock: float
    cpu: float


class FirstBatch(L.Callback):
    """Writes when the first batch of a training begins, and how many CPU seconds the process has used by then.

    Args:
        file: where it is written, as JSON.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, i: int) -> None:
        """Write both, once."""
        if not self.file.exists():
            self.file.write_text(json.dumps([time.time(), time.process_time()]))


def seconds(command: list[str], folder: Path) -> Seconds:
    """What a process takes from its start to its end."""
    here = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(here), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    clock, after = time.time() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nfailed with code {done.returncode}:\n{done.stderr[-3000:]}")
    return Seconds(clock, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)


def seconds_to_first_batch(flags: list[str], folder: Path) -> Seconds:
    """What a training takes from its process's start to its first batch."""
    noted = folder / "first_batch.json"
    noted.unlink(missing_ok=True)
    note = ["--trainer.callbacks=startup.FirstBatch", f"--trainer.callbacks.file={noted}"]
    start = time.time()
    seconds([sys.executable, TRAIN, *flags, *note], folder)
    reached, cpu = json.loads(noted.read_text())
    return Seconds(reached - start, cpu)


def turn(folder: Path) -> dict[str, Seconds]:
    """Every command once."""
    took = {code: seconds([sys.executable, "-c", code], folder) for code in IMPORTS}
    for flags in ANSWERS:
        took[f"train.py {' '.join(flags)}"] = seconds([sys.executable, TRAIN, *flags], folder)
    took["train.py fit, no W&B, to the first batch"] = seconds_to_first_batch([*FIT, "--trainer.logger=false"], folder)
    took["train.py fit, W&B offline, to the first batch"] = seconds_to_first_batch(FIT, folder)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_models(TINY, folder)
        rows = [json.dumps({"text": text}) for text in make_texts(TINY, 8, 10)]
        (folder / "texts.jsonl").write_text("\n".join(rows) + "\n")
        turns = [turn(folder) for _ in range(1 + args.repetitions)][1:]
    rows = []
    for what in turns[0]:
        medians = [statistics.median(took[what][i] for took in turns) for i in range(len(Seconds._fields))]
        rows.append([f"`{what}`", *(f"{median:.2f}" for median in medians)])
    print("\n".join(table(["", "seconds", "CPU seconds"], rows)))


if __name__ == "__main__":
    main()
