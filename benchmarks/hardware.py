"""How near an update comes to a processor's arithmetic, and sampling to its memory: shares of what they can do.

    python benchmarks/hardware.py --flops 989e12 --bandwidth 4.8e12                       # an H200, dense bfloat16
    python benchmarks/hardware.py --shape SmolLM2-135M --flops 390e9 --bandwidth 20e9 \
        --batch 16 --rows 64 --prompt 8 --response 24                                     # 2 CPU cores

Random weights in bfloat16, all trained. An update is forward, backward and optimizer step of a minibatch of PPO with a
value head; its operations are 6 per weight and token (the head's: per response token) and those of causal attention,
the MFU of Chowdhery et al. 2022 (https://arxiv.org/abs/2204.02311). A step of sampling has to read all weights once and
the keys and values of all tokens before it; that, in bytes per second, is held against the bandwidth.
"""

import argparse
import time
from collections.abc import Callable

import torch
from capacity import table
from meters import median_seconds
from model_shapes import LLAMAS, Run, Shape, backbone, parameters
from small_llama import llama_config
from transformers import LlamaForCausalLM

from lightning_rlhf.modules.compiled_decoding import CompiledDecoding
from lightning_rlhf.modules.packed_weights import packed_weights
from lightning_rlhf.modules.reading import read, set_fast_paths
from lightning_rlhf.modules.rollout import Sampling, sample

SHAPES = LLAMAS | {
    "SmolLM2-135M": Shape(30, 576, 9, 3, 64, 1536, 49_152, tied=True),
    "tiny": Shape(2, 64, 4, 2, 16, 128, 256, tied=True),
}


def update_flops(shape: Shape, rows: int, prompt: int, response: int) -> float:
    """Of forward and backward of a minibatch; nobody asks what comes after the last token."""
    length = prompt + response - 1
    blocks = shape.layers * sum(n * k for n, k in shape.linears)
    attention = shape.layers * shape.queries * length  # two products with Q · L each, half of them masked
    head = shape.vocabulary * shape.hidden
    return 6 * rows * (length * (blocks + attention) + response * head)


def step_bytes(shape: Shape, rows: int, length: int) -> float:
    """That a step of sampling has to read, in bfloat16: `length` tokens are before the new one."""
    weights = 2 * parameters(backbone(Run("sft", shape, rows, 0, 1), trained=True, head=True))
    return weights + 2 * rows * length * shape.layers * 2 * shape.keys


def seconds_of(work: Callable[[], object], device: torch.device, repetitions: int) -> float:
    """Median, until the device has done it."""

    def whole() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return median_seconds(whole, repetitions)


def measure(args: argparse.Namespace, device: torch.device) -> list[list[str]]:
    """A line for the update, and one for sampling."""
    shape, P, T = SHAPES[args.shape], args.prompt, args.response
    with device:
        model = LlamaForCausalLM(llama_config(shape)).to(torch.bfloat16)
        value = torch.nn.Linear(shape.hidden, 1)
    set_fast_paths(model, True, True, fused_layers=True, compiled_layers=args.compiled)
    optimizer = torch.optim.AdamW([*model.parameters(), *value.parameters()], lr=1e-6, fused=True)
    ids = torch.randint(1, shape.vocabulary, (args.batch, P + T), device=device)
    where = torch.arange(P + T, device=device).expand_as(ids) >= P

    def update() -> None:
        optimizer.zero_grad()
        said = read(model, ids, torch.ones_like(ids), where)
        (said.logprobs.sum() + value(said.hidden.float()).sum()).backward()
        optimizer.step()

    took = seconds_of(update, device, args.repetitions)
    rate, size = update_flops(shape, args.batch, P, T) / took, f"{args.batch} x {P + T}"
    lines = [["update", size, f"{took:.3f}", f"{rate / 1e12:.2f} TFLOP/s", share(rate, args.flops)]]
    optimizer.zero_grad()
    prompts = ids[:1, :P].expand(args.rows, -1)
    sampling = Sampling(T, (), 0)

    def roll_out() -> None:
        if args.compiled:
            sample(model, prompts, torch.ones_like(prompts), sampling, decoding=CompiledDecoding)
            return
        with packed_weights(model, args.rows):
            sample(model, prompts, torch.ones_like(prompts), sampling)

    took = seconds_of(roll_out, device, args.repetitions)
    rate = sum(step_bytes(shape, args.rows, P + i) for i in range(T)) / took
    size, said = f"{args.rows} x {T}", f"{rate / 1e9:.1f} GB/s, {args.rows * T / took:.0f} tokens/s"
    return [*lines, ["sampling", size, f"{took:.3f}", said, share(rate, args.bandwidth)]]


def share(found: float, possible: float) -> str:
    """In per cent."""
    return f"{100 * found / possible:.1f}%"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="Llama-3.2-1B")
    parser.add_argument("--flops", type=float, required=True, help="that the processor can do per second, in bfloat16")
    parser.add_argument("--bandwidth", type=float, required=True, help="of its memory, in bytes per second")
    parser.add_argument("--batch", type=int, default=32, help="sequences of an update's minibatch")
    parser.add_argument("--rows", type=int, default=64, help="sequences that are sampled at once")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--response", type=int, default=384)
    parser.add_argument("--compiled", action="store_true", help="layers and sampling, by torch.compile")
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    rows = measure(args, device)
    print("\n".join(table(["what", "rows x tokens", "seconds", "rate", "of what is possible"], rows)))
    print(f"\n{args.shape} on {device}, torch {torch.__version__}; {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
