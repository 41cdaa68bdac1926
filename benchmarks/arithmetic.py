"""Sums of four digits with checked answers: GRPO and PPO teach a small model to add that hardly could.

    python benchmarks/arithmetic.py               # minutes on two cores. Done runs are not repeated
    python benchmarks/arithmetic.py --prepare     # the data and the model only, for `train.py` by hand

The problems are all 10,000 sums `a+b+c+d=`. About one in eight is held out, by a hash of its digits without their
order, so that no held-out problem is a training problem with its digits moved. A Llama of 133,000 parameters with
random weights is fine-tuned for 32 steps on 2,000 training problems (`configs/arithmetic/sft.yaml`). From then on it is
told nothing but whether an answer that it sampled is right (`grpo.yaml`, `ppo.yaml`, with the seed set).

Each model is judged in the same way: `train.py validate` samples an answer to every held-out problem, with the same
noise, at temperature 1 and at 0.05, which nearly always takes the likeliest token. The first tells how sure the model
is of the right answer, the second how often it knows it best: what is gained there is not only sureness.

No method reaches 100: who never samples a right answer is never told of one. After SFT the model all but never says
small sums of one digit, 20, or 30 and more. What it says at all, it learns: all sums from 11 to 29 but 20 end right, in
every run, which is why runs with different weights have near-greedy accuracies that are equal to the digit.
Results: RUNS/<name>/result.json, RUNS/results.json and a table. Delete RUNS to begin anew.
"""

import argparse
import csv
import hashlib
import itertools
import json
import os
import random
import statistics
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from methods import train
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

SFT_ROWS = 2000
EOS, CHARACTERS = 0, "0123456789+="
TEMPERATURES = {"sampled": 1.0, "near_greedy": 0.05}
METHODS = {"grpo": "GRPO", "ppo": "PPO"}
Row = dict[str, str]

# --- data and model -------------------------------------------------------------------------------------------------


def problems() -> list[Row]:
    """All sums of four digits, in order."""
    return [_row(digits) for digits in itertools.product(range(10), repeat=4)]


def _row(digits: tuple[int, ...]) -> Row:
    answer = str(sum(digits))
    return {"prompt": "+".join(map(str, digits)) + "=", "completion": answer, "answer": answer}


def is_held_out(row: Row) -> bool:
    """Whether a hash of the digits, whatever their order, says so; for one set of digits in eight."""
    digits = "".join(sorted(row["prompt"].removesuffix("=").split("+")))
    return hashlib.sha256(digits.encode()).digest()[0] < 256 // 8


def splits() -> dict[str, list[Row]]:
    """`sft` (some of the training problems), `train` and `held_out`, shuffled; the same on every machine."""
    rows = problems()
    random.Random(0).shuffle(rows)
    training = [row for row in rows if not is_held_out(row)]
    return {"sft": training[:SFT_ROWS], "train": training, "held_out": [row for row in rows if is_held_out(row)]}


def chance(training: list[Row], held_out: list[Row]) -> dict[str, float]:
    """Held-out accuracy of who never reads the problem.

    Returns:
        guess: of who draws answers as often as they are right in training, Σ_s p_train(s) · p_held_out(s).
        constant: of who always gives the answer that is right most often in training.
    """
    known, asked = (Counter(row["answer"] for row in rows) for rows in (training, held_out))
    (commonest, _), *_ = known.most_common(1)
    drawn = sum(count * asked[answer] for answer, count in known.items())
    return {"guess": drawn / known.total() / asked.total(), "constant": asked[commonest] / asked.total()}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    vocabulary = {"<eos>": EOS} | {character: i for i, character in enumerate(CHARACTERS, start=1)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def make_model() -> LlamaForCausalLM:
    """A Llama with random weights, the same at every call."""
    config = LlamaConfig(
        vocab_size=1 + len(CHARACTERS),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def prepare(runs: Path) -> None:
    """Write RUNS/data/*.jsonl and the folder RUNS/start."""
    (runs / "data").mkdir(parents=True, exist_ok=True)
    for name, rows in splits().items():
        (runs / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_model().save_pretrained(runs / "start")
    make_tokenizer().save_pretrained(runs / "start")


# --- runs -----------------------------------------------------------------------------------------------------------


def run(name: str, seed: int, runs: Path) -> None:
    """Train by a config and judge, as far as that is not done."""
    folder = runs / (name if name == "sft" else f"{name}-{seed}")
    if (folder / "result.json").exists():
        return
    print(f"{folder.name} ...", flush=True)
    trained = folder / "trained.json"
    if not trained.exists():
        seconds, gib = fit(name, seed, folder, runs)
        trained.write_text(json.dumps({"name": name, "seed": seed, "seconds": seconds, "gib": gib}) + "\n")
    result = json.loads(trained.read_text()) | judge(folder, runs)
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")


def fit(name: str, seed: int, folder: Path, runs: Path) -> tuple[float, float]:
    """Train by a config of that name with a seed; seconds and GiB."""
    model, data = ("start", "sft") if name == "sft" else ("sft/model", "train")
    return train(
        "fit", "--config", f"configs/arithmetic/{name}.yaml", "--seed_everything", str(seed),
        "--model.model", str(runs / model), *_data(runs, data), "--trainer.default_root_dir", str(folder)
    )  # fmt: skip


def judge(folder: Path, runs: Path) -> dict[str, float]:
    """Held-out accuracy of a run's model at each of the temperatures."""
    found = {}
    for how, temperature in TEMPERATURES.items():
        judged = folder / how
        train(
            "validate", "--config", "configs/arithmetic/grpo.yaml", "--model.model", str(folder / "model"),
            "--model.temperature", str(temperature), *_data(runs, "train"), "--trainer.default_root_dir", str(judged)
        )  # fmt: skip
        with (judged / "validate" / "metrics.csv").open() as file:
            *_, last = csv.DictReader(file)
        found[how] = float(last["val/reward"])
    return found


def _data(runs: Path, name: str) -> list[str]:
    data = runs / "data"
    return ["--data.data", str(data / f"{name}.jsonl"), "--data.val_data", str(data / "held_out.jsonl")]


# --- results --------------------------------------------------------------------------------------------------------


def gather(runs: Path, seeds: list[int]) -> dict:
    """Everything that was measured, as it goes into results.json."""
    rows = splits()
    folders = [runs / "sft", *(runs / f"{method}-{seed}" for method in METHODS for seed in seeds)]
    return {
        "problems": {name: len(of_split) for name, of_split in rows.items()},
        "chance": chance(rows["train"], rows["held_out"]),
        "runs": [json.loads((folder / "result.json").read_text()) for folder in folders],
    }


def table(results: dict) -> Iterator[str]:
    """Accuracies and gains in percent, mean ± standard deviation over seeds, and each method's smallest gain."""
    start, *others = results["runs"]
    yield "| held-out accuracy, % | sampled | near-greedy | smallest gain of a seed, in points | seconds |"
    yield "| --- | --- | --- | --- | --- |"
    yield f"| chance: a guess | {100 * results['chance']['guess']:.1f} | | | |"
    yield f"| chance: always the commonest answer | {100 * results['chance']['constant']:.1f} | | | |"
    before = " | ".join(_percent([start], how) for how in TEMPERATURES)
    yield f"| SFT (the start) | {before} | | {start['seconds']:.0f} |"
    for method, name in METHODS.items():
        own = [one for one in others if one["name"] == method]
        gains = [f"{100 * (min(one[how] for one in own) - start[how]):+.1f}" for how in TEMPERATURES]
        cells = [_percent(own, "sampled"), _percent(own, "near_greedy"), f"{gains[0]}; near-greedy {gains[1]}"]
        yield f"| {name} | {' | '.join(cells)} | {statistics.mean(one['seconds'] for one in own):.0f} |"


def _percent(runs: list[dict], how: str) -> str:
    values = [100 * one[how] for one in runs]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true", help="write the data and the model, and stop")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--runs", type=Path, default=Path(__file__).parents[1] / "runs" / "arithmetic")
    args = parser.parse_args()
    runs = args.runs.resolve()
    disable_progress_bar()
    if not (runs / "start" / "tokenizer.json").exists():
        prepare(runs)
    if args.prepare:
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # matrices this small are not shared out with gain
    run("sft", 1, runs)
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(run, method, seed, runs) for seed in args.seeds for method in METHODS]
    for job in jobs:
        job.result()
    results = gather(runs, args.seeds)
    (runs / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
