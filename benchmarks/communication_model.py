"""Bytes that one rank sends in a training, worked out as in `memory_model.py`, and how long that takes at a bandwidth.

With M ranks, over a ring: an all-gather or a reduce-scatter of X bytes sends (M − 1) / M · X per rank, an all-reduce
twice as much. Sums and counts (a few bytes per step) are left out.
"""

from memory_model import held
from model_shapes import BOOL, FLOAT32, INT64, Network, Run, frozen, in_training

NVLINK = 450e9  # bytes per second and GPU, one way: H100, NVLink 4
NETWORK = 50e9  # 400 Gbit/s per GPU
FLOPS = 0.4 * 989e12  # of an H100 in bfloat16, at 40% of its peak


def over_ring(size: float, ranks: int) -> float:
    """(M − 1) / M · X: bytes that a rank sends to gather, or to reduce and scatter, X bytes."""
    return (ranks - 1) / ranks * size


def padded(network: Network, ranks: int, trained_only: bool = False) -> int:
    """X of a network: M times the fullest rank's shards."""
    return ranks * held([network], ranks, trained_only)


def reached_by_gradient(network: Network) -> Network:
    """Units that are gathered for the backward pass: the root, those from the first trained one on, and one more.

    FSDP2 fetches the block before the one at work; where the backward pass ends there, in vain.
    """
    root, *blocks = network
    if not blocks:
        return network
    first = min(i for i, unit in enumerate(blocks) if any(w.trained for w in unit))
    return [root, *blocks[max(first - 1, 0) :]]


def per_step(run: Run, gloo: bool = False) -> dict[str, float]:
    """Bytes sent per rank and optimizer step.

    DDP: all-reduce of the gradients, once.  FSDP2, per micro-batch: all-gather of all weights, frozen ones too, for the
    forward pass and again for the backward pass, and reduce-scatter of the gradients. gloo has no reduce-scatter: it
    makes an all-reduce, twice the bytes.
    """
    networks, m, micro_batches = in_training(run), run.ranks, run.accumulate_grad_batches
    if run.strategy == "ddp":
        return {"all-reduce": 2 * over_ring(held(networks, trained_only=True), m)}
    if run.strategy != "fsdp2":
        return {}
    return {
        "gather, forward": micro_batches * over_ring(sum(padded(n, m) for n in networks), m),
        "gather, backward": micro_batches * over_ring(sum(padded(reached_by_gradient(n), m) for n in networks), m),
        "reduce-scatter": micro_batches
        * (2 if gloo else 1)
        * over_ring(sum(padded(n, m, trained_only=True) for n in networks), m),
    }


def per_rollout(run: Run) -> dict[str, float]:
    """Bytes sent per rank and PPO iteration outside the optimizer steps.

    Everywhere the experience: R rows of 9P + 25T bytes to each other rank.  FSDP2: the policy once, or for each token
    and each scoring pass; reference, reward model and value for each of their ceil(R / F) passes.
    """
    m, tokens = run.ranks, INT64 + BOOL
    row = run.prompt * tokens + run.response * (tokens + 4 * FLOAT32)
    sent = {"experience": (m - 1) * run.rollout_batch_size * row}
    if run.strategy != "fsdp2":
        return sent if m > 1 else {}
    passes = -(-run.rollout_batch_size // run.forward_batch_size)
    policy, *value = (padded(network, m) for network in in_training(run))
    of_policy = 1 if run.unshard_rollouts else run.response + passes * (2 if run.lora_r else 1)
    others = passes * (sum(value) + sum(padded(network, m) for network in frozen(run)))
    return {"policy": over_ring(of_policy * policy, m), "other networks": over_ring(others, m)} | sent


def bandwidth(ranks: int, per_node: int = 8) -> float:
    """Bytes per second that a ring over the ranks passes on at each rank: NVLink in a node, between nodes the network
    cards of a whole node, since NCCL lays one ring through each."""
    return NVLINK if ranks <= per_node else min(NVLINK, per_node * NETWORK)


def flops_per_token(run: Run) -> int:
    """Floating-point operations per token and parameter of an update, attention left out: 2 each for the forward pass,
    for doing it again, for the gradient of the inputs and for that of the weights."""
    return 4 + 2 * run.gradient_checkpointing + (0 if run.lora_r else 2)


def tokens_to_hide(run: Run, rate: float) -> float:
    """Tokens per rank and micro-batch from which on computing takes as long as FSDP2's communication at a bandwidth.

    (2 · weight bytes + gradient bytes) / rate = operations · tokens / FLOPS, each per parameter: it does not matter how
    many parameters there are.
    """
    sent = 2 * run.size + (0 if run.lora_r else run.size)
    return sent / rate * FLOPS / flops_per_token(run)
