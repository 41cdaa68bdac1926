"""Trainings on the command line that are killed and started again, each in a child of this process.

python kills.py FOLDER     writes what each of them was: FOLDER/trials.json

The child is a fork: the libraries are imported once, and the child has no threads to miss.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from trainings import TEXTS, make_models

from lightning_rlhf.modules import rollout
from lightning_rlhf.train import main

COMMON = (
    "--trainer.accelerator=cpu --trainer.logger=false --trainer.enable_progress_bar=false --trainer.log_every_n_steps=1"
    " --trainer.max_epochs=4 --seed_everything=5 --ckpt_path=last --checkpoint.save_top_k=1"
)
FLAGS = {
    "ppo": "--model=PPOModule --model.learning_rate=0.05 --model.model={0}/policy --model.reward=trainings.letters"
    " --model.rollout_batch_size=8"
    " --model.minibatch_size=4 --model.num_passes=2 --model.max_new_tokens=6 --model.normalize_scores=true"
    " --model.kl_target=1 --data=PromptDataModule --data.data={0}/prompts.jsonl --data.val_data={0}/prompts.jsonl",
    "sft": "--model=SFTModule --model.learning_rate=0.05 --model.model={0}/policy --model.lora_r=2"
    " --data=SFTDataModule --data.data={0}/texts.jsonl --data.batch_size=2 --checkpoint.every_n_train_steps=2",
    "reward": "--model=RewardModule --model.learning_rate=0.05 --model.model={0}/reward"
    " --data=RatingDataModule --data.data={0}/ratings.jsonl --data.val_data={0}/ratings.jsonl"
    " --data.batch_size=3 --checkpoint.every_n_train_steps=3",
}


def write_data(folder: Path) -> None:
    rows = {
        "prompts": [{"prompt": text} for text in TEXTS],
        "texts": [{"text": text} for text in TEXTS],
        "ratings": [{"text": text, "ratings": [len(text), i % 3]} for i, text in enumerate(TEXTS)],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(phase: str, when: int) -> None:
    """Arm this process: it is killed the `when`-th time that it is in the phase."""
    left = [when]

    def count(then=die) -> None:
        left[0] -= 1
        if left[0] == 0:
            then()

    if phase == "rollout":
        draw = rollout._draw
        rollout._draw = lambda *args: (count(), draw(*args))[1]
    elif phase == "update":
        backward = torch.Tensor.backward
        torch.Tensor.backward = lambda self, *a, **k: (backward(self, *a, **k), count())[0]
    elif phase == "checkpoint":
        save = torch.save

        def half(checkpoint, file, *args, **kwargs):
            save(checkpoint, file, *args, **kwargs)
            count(lambda: (file.truncate(file.tell() // 2), die()))

        torch.save = half


def train(name: str, folder: Path, root: Path, phase: str = "", when: int = 0) -> int:
    """Run the command in a child; its process id."""
    if pid := os.fork():
        return pid
    with (folder / "log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    die_at(phase, when)
    try:
        main(["fit", f"--trainer.default_root_dir={root}", *COMMON.split(), *FLAGS[name].format(folder).split()])
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def wait(pid: int) -> int:
    """The child's exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def trial(name: str, folder: Path, label: str, kills: list[tuple[str, int]], random_kills: int, seconds: float) -> dict:
    """Kill a run some times, each time starting it again, then let it finish."""
    root = folder / f"{name}-{label}"
    codes = [wait(train(name, folder, root, phase, when)) for phase, when in kills]
    for _ in range(random_kills):
        pid = train(name, folder, root)
        time.sleep(random.uniform(0.1, 0.9) * seconds)
        os.kill(pid, signal.SIGKILL)
        codes.append(wait(pid))
    last = wait(train(name, folder, root))
    return {"name": name, "label": label, "root": str(root), "killed": codes, "finished": last}


if __name__ == "__main__":
    folder = Path(sys.argv.pop())
    torch.set_num_threads(1)
    make_models(folder)
    write_data(folder)
    trials = []
    for name in FLAGS:
        start = time.monotonic()
        trials.append(trial(name, folder, "whole", [], 0, 0))
        seconds = time.monotonic() - start
        phases = ["rollout"] * (name == "ppo") + ["update", "checkpoint"]
        moments = {"rollout": 14, "update": 6, "checkpoint": 4}
        trials += [trial(name, folder, phase, [(phase, moments[phase])], 0, 0) for phase in phases]
        trials.append(trial(name, folder, "again and again", [("checkpoint", 1), ("update", 5), ("update", 5)], 0, 0))
        trials.append(trial(name, folder, "at random", [], 2, seconds))
    (folder / "trials.json").write_text(json.dumps(trials))
