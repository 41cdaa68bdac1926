"""Tables of docs/scaling.md: what fits on how many GPUs, and how long communication takes. Arithmetic, not measurement.

python benchmarks/capacity.py
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from communication_model import (
    FLOPS,
    NETWORK,
    NVLINK,
    bandwidth,
    flops_per_token,
    per_rollout,
    per_step,
    tokens_to_hide,
)
from memory_model import peak, phases
from model_shapes import LLAMAS, Run, backbone, parameters

GPU = 80e9
RESERVE = 6e9  # CUDA context, NCCL's buffers, what the allocator cannot use
PPO = Run(
    "ppo",
    LLAMAS["Llama-3.1-8B"],
    batch=4,
    prompt=512,
    response=512,
    accumulate_grad_batches=2,
    rollout_batch_size=32,
    forward_batch_size=8,
    gradient_checkpointing=True,
    cuda=True,
)
SFT = replace(PPO, method="sft", prompt=0, response=2048)
WAYS = {
    "full, float32 + `bf16-mixed`": dict(dtype="float32", mixed=True),
    "full, bfloat16": dict(dtype="bfloat16"),
    "LoRA r = 16, bfloat16": dict(dtype="bfloat16", lora_r=16),
}
PLACES = {
    "1 GPU": dict(strategy="auto", ranks=1),
    "8, DDP": dict(strategy="ddp", ranks=8),
    "8, FSDP2": dict(strategy="fsdp2", ranks=8),
    "64, FSDP2": dict(strategy="fsdp2", ranks=64),
}


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """Lines of Markdown."""
    names = list(header)
    for cells in [names, ["---"] * len(names), *rows]:
        yield "| " + " | ".join(cells) + " |"


def fits(run: Run) -> bool:
    """Whether it fits on a GPU."""
    return peak(run) <= GPU - RESERVE


def cell(run: Run) -> str:
    """GB per GPU; with a star if only without `unshard_rollouts`, and in brackets if it does not fit."""
    apart = replace(run, unshard_rollouts=False)
    if fits(run):
        return f"{peak(run) / 1e9:.0f}"
    return f"{peak(apart) / 1e9:.0f}*" if fits(apart) else f"({peak(apart) / 1e9:.0f})"


def capacity(run: Run) -> Iterator[str]:
    """GB per GPU of each model, way and place."""
    rows = []
    for model, shape in LLAMAS.items():
        for way, settings in WAYS.items():
            cells = [cell(replace(run, shape=shape, **settings, **place)) for place in PLACES.values()]
            rows.append([model, way, *cells])
    return table(["model", "what is trained", *PLACES], rows)


def by_kind(run: Run) -> Iterator[str]:
    """GB per GPU of each kind in each phase."""
    found = phases(run)
    kinds = list(dict.fromkeys(kind for parts in found.values() for kind in parts))
    kinds = [kind for kind in kinds if any(parts.get(kind) for parts in found.values())]
    rows = [[kind, *[f"{parts.get(kind, 0) / 1e9:.2f}" for parts in found.values()]] for kind in kinds]
    total = ["**sum**", *[f"**{sum(parts.values()) / 1e9:.2f}**" for parts in found.values()]]
    return table(["GB", *found], [*rows, total])


def seconds(run: Run) -> list[str]:
    """GB sent and seconds, of an optimizer step and a rollout; seconds of computing the step."""
    step, rollout = sum(per_step(run).values()), sum(per_rollout(run).values())
    rate = bandwidth(run.ranks)
    tokens = run.accumulate_grad_batches * run.batch * run.length
    compute = flops_per_token(run) * parameters(backbone(run, trained=True, head=True)) * tokens / FLOPS
    sent = [f"{step / 1e9:.2f} GB, {step / rate:.2f} s", f"{compute:.2f} s"]
    return [*sent, f"{rollout / 1e9:.2f} GB, {rollout / rate:.2f} s"]


def communication() -> Iterator[str]:
    """Each model and way on 8 GPUs and on 64."""
    rows = []
    for model, shape in LLAMAS.items():
        for way, settings in WAYS.items():
            for place in ("8, DDP", "8, FSDP2", "64, FSDP2"):
                run = replace(PPO, shape=shape, **settings, **PLACES[place])
                run = replace(run, unshard_rollouts=fits(run) or run.strategy == "ddp")
                if fits(run):
                    rows.append([model, way, place + ("" if run.unshard_rollouts else " *"), *seconds(run)])
    header = ["model", "what is trained", "GPUs", "a step sends", "a step computes", "a rollout sends"]
    return table(header, rows)


def break_even() -> Iterator[str]:
    """Tokens per GPU and micro-batch from which on FSDP2's communication can hide behind computing."""
    rates = {"NVLink, 450 GB/s": NVLINK, "8 cards of 400 Gbit/s": 8 * NETWORK, "one card, 50 GB/s": NETWORK}
    rows = [
        [way, *[f"{tokens_to_hide(replace(PPO, **settings), rate):,.0f}" for rate in rates.values()]]
        for way, settings in WAYS.items()
    ]
    return table(["what is trained", *rates], rows)


def main() -> None:
    """Print all tables."""
    example = replace(PPO, **WAYS["LoRA r = 16, bfloat16"], **PLACES["8, FSDP2"])
    tables = {
        "PPO with a value head, GB per GPU": capacity(PPO),
        "SFT, GB per GPU": capacity(SFT),
        "PPO, Llama-3.1-8B, LoRA, 8 GPUs, FSDP2, by kind": by_kind(example),
        "PPO, full, bfloat16, Llama-3.1-8B, 8 GPUs, FSDP2, by kind": by_kind(
            replace(PPO, **WAYS["full, bfloat16"], **PLACES["8, FSDP2"])
        ),
        "PPO, communication": communication(),
        "Tokens per GPU and micro-batch at which FSDP2 sends as long as it computes": break_even(),
    }
    for title, lines in tables.items():
        print(f"### {title}\n", *lines, "", sep="\n")


if __name__ == "__main__":
    main()
