"""Bytes that one rank holds in a training, worked out from the shape of the model and the settings of the run.

Only arithmetic: nothing is allocated. `capacity.py` prints tables of it, `scaling.py` measures how far it is off, and
docs/scaling.md explains the formulas. The symbols are those of `model_shapes.py`.
"""

from dataclasses import replace

from model_shapes import BOOL, FLOAT32, INT64, Network, Run, frozen, in_training, weights_of

CHUNK = 2**23 * FLOAT32  # float32 logits that functional/logprobs.py works on at a time


def held(networks: list[Network], shards: int = 1, trained_only: bool = False) -> int:
    """Bytes of parameters on the fullest rank: Σ ceil(rows / M) · columns · bytes per element."""
    return sum(w.shard(shards) for w in weights_of(networks) if w.trained or not trained_only)


def optimizer_states(networks: list[Network], shards: int = 1) -> int:
    """AdamW: two moments in the parameter's dtype and a float32 step count per parameter."""
    count = sum(w.trained for w in weights_of(networks))
    return 2 * held(networks, shards, trained_only=True) + FLOAT32 * count


# --- what a forward pass leaves for the backward pass ---------------------------------------------------------------


def block_activations(run: Run, first: bool = False) -> int:
    """Bytes that a trained block saves, B · L tokens; `first` is the first block with adapters, whose input is frozen.

    Norms: 2 (4H + 4), and if their weights are trained 2cH.  Attention: query and output 2aQ, key and value 2aK (2aQ
    where they are repeated), 4 per head, and the mask aL.  MLP: gate, its activation and up, 3aI.  Then linear_inputs.
    """
    s, a, c, full = run.shape, run.compute, run.size, not run.lora_r
    norm = 4 * s.hidden + 4  # its input in float32 and 1 / rms
    norms = (2 if full or not first else 1) * norm + 2 * full * c * s.hidden
    repeated = s.queries if run.padded else s.keys
    attention = a * (2 * s.queries + 2 * repeated) + FLOAT32 * s.heads + run.padded * a * run.length
    return run.batch * run.length * (norms + attention + 3 * a * s.intermediate + linear_inputs(run))


def linear_inputs(run: Run) -> int:
    """Bytes per token that a block's linear layers save of their inputs, beyond what attention has saved already.

    Equal inputs are one tensor (q, k, v; gate, up) unless each layer makes its own copy: autocast does of float32, and
    LoRA, whose adapters want float32, of bfloat16.
    """
    s, full = run.shape, not run.lora_r
    size = run.compute if full or run.mixed else FLOAT32
    copied = run.mixed if run.size == 4 else not full
    attention_output = 0 if full or not copied else s.queries
    inputs = (5 if copied else 2) * s.hidden + attention_output + s.intermediate
    return size * inputs + (0 if full else 7 * size * run.lora_r)


def weight_copies(run: Run) -> int:
    """Bytes of a block's weights in bfloat16: under autocast float32 weights are cast, and the casts saved."""
    return 2 * sum(rows * columns for rows, columns in run.shape.linears) if run.mixed and run.size == 4 else 0


def stack_activations(run: Run) -> int:
    """Bytes that all blocks save, and the final norm and the tables of rotations after and before them."""
    s, tokens = run.shape, run.batch * run.length
    layers = s.layers if run.lora_last_layers is None or not run.lora_r else run.lora_last_layers
    of_weights = 0 if run.lora_r else run.size * s.hidden + INT64  # for the gradients of the norm and of the embedding
    ends = tokens * (4 * s.hidden + 4 + 2 * run.size * s.head_dim + of_weights)
    if run.gradient_checkpointing:
        return ends + s.layers * tokens * run.size * s.hidden  # each block's input; update() makes one block anew
    blocks = (layers - 1) * block_activations(run) + block_activations(run, first=True)
    return ends + blocks + layers * weight_copies(run)


def logit_rows(run: Run) -> int:
    """Positions whose logits are computed in a micro-batch: B · T, those that count."""
    return 0 if run.method == "reward" else run.batch * run.response


def head_activations(run: Run) -> int:
    """Bytes that the language-model head (with its autocast copy) and scalar heads save of their inputs."""
    s = run.shape
    copy = 2 * s.vocabulary * s.hidden if run.mixed and run.size == 4 and run.method != "reward" else 0
    scalar = {"ppo": run.batch * (run.response + 1), "sft": 0, "reward": run.batch * run.length}[run.method]
    return copy + (0 if run.lora_r else logit_rows(run) * run.compute * s.hidden) + scalar * FLOAT32 * s.hidden


def activations(run: Run) -> int:
    """Bytes saved for the backward pass, without logits."""
    total = stack_activations(run) + head_activations(run)
    if run.method == "ppo" and run.value == "network":
        total += activations(replace(run, method="reward", lora_r=0))  # it is trained whole
    return total


def saved_logits(run: Run) -> int:
    """Bytes of logits at the end of the forward pass: (a + 4) V per position, the logits and logits / τ in float32."""
    return logit_rows(run) * run.shape.vocabulary * (run.compute + FLOAT32)


def backward_logits(run: Run) -> int:
    """Bytes when the backward pass goes through them: max((a + 4) n + 3 chunks, 4 a n), n the number of logits.

    First: logsumexp of one chunk. Then: the logits, the gradient of logsumexp, and that of the chosen logits twice
    (zeros, and the zeros with the entries).
    """
    n = logit_rows(run) * run.shape.vocabulary
    return max((run.compute + FLOAT32) * n + 3 * min(CHUNK, FLOAT32 * n), 4 * run.compute * n)


# --- without gradient -----------------------------------------------------------------------------------------------


def kv_cache(run: Run, length: int | None = None) -> int:
    """Bytes of keys and values of a whole rollout: R · (P + T − 1) · N · 2K · c; the last token is never fed back.

    Under bf16-mixed, too, they have the dtype of the weights: the rotation makes keys float32, and the cache makes
    values what keys are.
    """
    s, length = run.shape, run.length - 1 if length is None else length
    return run.rollout_batch_size * length * s.layers * 2 * s.keys * run.size


def block_pass(run: Run, length: int) -> int:
    """Bytes per token that come and go in a block without gradient: the MLP's products, and 2H of hidden states.

    Three products of width I; with LoRA two, and the adapter's output twice.
    """
    s, a = run.shape, run.compute
    adapter = FLOAT32 if not run.mixed else 2
    width = (2 * a + 2 * adapter) if run.lora_r else 3 * a
    hidden = 2 * run.size * s.hidden + (adapter * s.hidden if run.lora_r else 0)
    return width * s.intermediate + hidden + 2 * run.size * s.head_dim + run.padded * length * BOOL


def sampling(run: Run) -> int:
    """Bytes beside weights while responses are sampled, the whole rollout at once: max(prompt, draw).

    Prompt: its cache and R · P tokens in a block.  Draw: the whole cache, one layer's keys once more (they grow by a
    copy), and R rows of logits, in float32 and twice in float64.
    """
    s, rows = run.shape, run.rollout_batch_size
    prompt = rows * run.prompt * (block_pass(run, run.prompt) + 2 * run.size * s.hidden)
    wide = FLOAT32 if run.compute != FLOAT32 else 0
    draw = rows * (s.vocabulary * (run.compute + wide + 2 * 8) + run.length * s.keys * run.size)
    return max(kv_cache(run, run.prompt) + prompt, kv_cache(run) + draw)


def scoring(run: Run) -> int:
    """Bytes beside weights while F responses are scored: the larger of two moments.

    With n = F · T · V logits: entropy of one chunk, a n + 5 chunks, beside the last hidden states; the reference's last
    block, beside those of the policy.
    """
    s, rows = run.shape, min(run.forward_batch_size, run.rollout_batch_size)
    n, tokens = rows * run.response * s.vocabulary, rows * run.length
    state = tokens * s.hidden * run.size
    entropy = run.compute * n + state + 5 * min(CHUNK, FLOAT32 * n)
    return max(entropy, state + tokens * block_pass(run, run.length))


# --- together -------------------------------------------------------------------------------------------------------


def gathered(network: Network, shards: int, root_gradients: int = 0, block_gradients: int = 0) -> int:
    """Bytes of FSDP2 while a network is in use: root and two blocks whole, one at work and one in the gather's buffer.

    With so many copies of their gradients; a frozen unit has none.
    """
    if shards == 1:
        return 0
    root, *blocks = ([w._replace(rows=-(-w.rows // shards) * shards) for w in unit] for unit in network)
    block = max((sum(w.bytes * (1 + block_gradients * w.trained) for w in unit) for unit in blocks), default=0)
    return sum(w.bytes * (1 + root_gradients * w.trained) for w in root) + 2 * block


def experience(run: Run) -> int:
    """Bytes of the experience of all ranks, which each holds: M · R · (9P + 25T)."""
    per_token = INT64 + BOOL
    row = run.prompt * per_token + run.response * (per_token + 4 * FLOAT32)
    return run.ranks * run.rollout_batch_size * row


def static(run: Run) -> dict[str, int]:
    """Bytes that are there all the time, in a rollout without the gradients."""
    networks = in_training(run)
    gradients = held(networks, run.shards, trained_only=True)
    return {
        "weights": held(networks, run.shards),
        "gradients": gradients,
        "optimizer": optimizer_states(networks, run.shards),
        "frozen": held(frozen(run), run.shards),
        "buckets": gradients if run.strategy == "ddp" else 0,
        "experience": experience(run) if run.method == "ppo" else 0,
    }


def update(run: Run) -> list[dict[str, int]]:
    """Bytes at four moments of a micro-batch: the end of the forward pass; in the backward pass the logits, the block
    that is largest, and the end.

    The gradients of the last step are gone by then; those of micro-batches before are kept. In a block: four gradients
    of width I, and with gradient checkpointing what it saves, made anew. At the end FSDP2 has the root's gradients
    twice, one to send.
    """
    networks, shards = in_training(run), run.shards
    kept = {} if run.accumulate_grad_batches > 1 else {"gradients": 0}
    saved = {"activations": activations(run)}
    in_use = sum(gathered(network[:1], shards) for network in networks)
    in_use += max(gathered([[], *network[1:]], shards) for network in networks)
    at_work = sum(gathered(network[:1], shards, 1) for network in networks)
    at_work += max(gathered([[], *network[1:]], shards, 0, 1) for network in networks)
    block = 4 * run.compute * run.batch * run.length * run.shape.intermediate
    if run.gradient_checkpointing:
        block += block_activations(run) + weight_copies(run)
    return [
        saved | kept | {"logits": saved_logits(run), "gathered": in_use},
        saved | kept | {"logits": backward_logits(run), "gathered": in_use},
        saved | kept | {"block": block, "gathered": at_work},
        {"gathered": max(gathered(network[:1], shards, 2) for network in networks)},
    ]


def rollout(run: Run) -> dict[str, dict[str, int]]:
    """Bytes while PPO samples and scores. A network that FSDP2 gathers for the whole rollout has none beside it."""
    policy, *others = in_training(run)
    whole = held([policy]) if run.unshard_rollouts and run.shards > 1 else 0
    in_use = [gathered(network, run.shards) for network in [*frozen(run), *others, *([] if whole else [policy])]]
    return {
        "sampling": {"gradients": 0, "sampling": sampling(run), "gathered": whole or gathered(policy, run.shards)},
        "scoring": {"gradients": 0, "scoring": scoring(run), "gathered": whole + max(in_use)},
    }


def phases(run: Run) -> dict[str, dict[str, int]]:
    """Bytes by kind at the worst moment of each phase; every phase has those of `static`, too."""
    found = {"update": max((static(run) | parts for parts in update(run)), key=lambda parts: sum(parts.values()))}
    if run.cuda:
        found["step"] = {"optimizer step": held(in_training(run), run.shards, trained_only=True)}
    if run.method == "ppo":
        found |= rollout(run)
    return {name: static(run) | parts for name, parts in found.items()}


def peak(run: Run) -> int:
    """Bytes at the worst moment of all."""
    return max(sum(parts.values()) for parts in phases(run).values())
