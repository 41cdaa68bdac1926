"""The shape of a Llama, the settings of a run, and the parameters of the networks that the run has.

Symbols, here and in `memory_model.py`: M ranks; per rank B rows in a micro-batch, R responses in a rollout, P prompt
and T response tokens, L = P + T; a model has N layers, hidden size H, query width Q, key width K, MLP width I,
vocabulary V.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

FLOAT32, INT64, BOOL = 4, 8, 1


class Weight(NamedTuple):
    """A parameter: FSDP2 shards its rows."""

    rows: int
    columns: int
    size: int
    """Bytes per element."""
    trained: bool

    @property
    def bytes(self) -> int:
        """Of the whole parameter."""
        return self.rows * self.columns * self.size

    def shard(self, ranks: int) -> int:
        """Bytes on the fullest rank, ceil(rows / ranks) rows; collectives send as many for every rank."""
        return -(-self.rows // ranks) * self.columns * self.size


Network = list[list[Weight]]
"""The units of FSDP2: first the root, which is gathered for the whole pass, then each block (and a scalar head)."""


@dataclass(frozen=True)
class Shape:
    """A Llama."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool = False

    @property
    def queries(self) -> int:
        """Width of the queries."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of the keys, and of the values."""
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> list[tuple[int, int]]:
        """Rows (output) and columns (input) of a block's q, k, v, o, gate, up, down."""
        h, i = self.hidden, self.intermediate
        attention = [(self.queries, h), (self.keys, h), (self.keys, h), (h, self.queries)]
        return [*attention, (i, h), (i, h), (h, i)]


LLAMAS = {
    "Llama-3.2-1B": Shape(16, 2048, 32, 8, 64, 8192, 128_256, tied=True),
    "Llama-3.1-8B": Shape(32, 4096, 32, 8, 128, 14_336, 128_256),
    "Llama-3.1-70B": Shape(80, 8192, 64, 8, 128, 28_672, 128_256),
}


@dataclass(frozen=True)
class Run:
    """A training. The fields that the modules have too are called as there."""

    method: Literal["sft", "reward", "ppo"]
    shape: Shape
    batch: int
    """B: rows of a micro-batch per rank; of `PreferenceDataModule`, two per pair."""
    prompt: int
    """P."""
    response: int
    """T: response tokens, the ones that count in SFT."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    mixed: bool = False
    """The Trainer's `precision=bf16-mixed`."""
    lora_r: int = 0
    lora_last_layers: int | None = None
    gradient_checkpointing: bool = False
    value: Literal["head", "network"] = "head"
    reward_model: bool = True
    """PPO: a reward model of the policy's shape; False is a function."""
    accumulate_grad_batches: int = 1
    """Micro-batches per optimizer step."""
    rollout_batch_size: int = 0
    """R."""
    forward_batch_size: int = 32
    padded: bool = True
    """Whether sequences have padding: attention then gets a mask, and keys and values repeated for each query head."""
    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"
    ranks: int = 1
    unshard_rollouts: bool = True
    cuda: bool = False
    """AdamW on a GPU takes all parameters at once, which costs one more copy of what is trained."""

    @property
    def size(self) -> int:
        """c: bytes per element of the backbone's weights, and of the stream of hidden states."""
        return 4 if self.dtype == "float32" else 2

    @property
    def compute(self) -> int:
        """a: bytes per element of what linear layers read and write."""
        return 2 if self.mixed else self.size

    @property
    def length(self) -> int:
        """L = P + T."""
        return self.prompt + self.response

    @property
    def shards(self) -> int:
        """Ranks that share a parameter."""
        return self.ranks if self.strategy == "fsdp2" else 1


def backbone(run: Run, trained: bool, head: bool) -> Network:
    """Embedding, final norm and (for a language model) head; then each block with its adapters."""
    s, c = run.shape, run.size
    adapted = s.layers if run.lora_last_layers is None else run.lora_last_layers
    whole, r = trained and not run.lora_r, run.lora_r if trained else 0
    ends = 2 if head and not s.tied else 1
    root = [Weight(s.vocabulary, s.hidden, c, whole)] * ends + [Weight(s.hidden, 1, c, whole)]
    block = [Weight(*linear, c, whole) for linear in s.linears] + [Weight(s.hidden, 1, c, whole)] * 2
    pairs = [(Weight(r, columns, 4, True), Weight(rows, r, 4, True)) for rows, columns in s.linears] if r else []
    adapters = [weight for pair in pairs for weight in pair]
    return [root, *[block] * (s.layers - adapted), *[block + adapters] * adapted]


def scorer(run: Run, trained: bool) -> Network:
    """A reward model, or with a float32 head that is trained whole, one in training or a value network."""
    return [*backbone(run, trained, head=False), [Weight(1, run.shape.hidden, FLOAT32, trained)]]


def value_network(run: Run) -> Network:
    """PPO's head on the policy, a unit of its own, or the network of its own, which is trained whole."""
    if run.value == "head":
        return [[Weight(1, run.shape.hidden, FLOAT32, True), Weight(1, 1, FLOAT32, True)]]
    return scorer(replace(run, lora_r=0), trained=True)


def in_training(run: Run) -> list[Network]:
    """The networks that the module registers."""
    if run.method == "reward":
        return [scorer(run, trained=True)]
    policy = backbone(run, trained=True, head=True)
    return [policy, value_network(run)] if run.method == "ppo" else [policy]


def frozen(run: Run) -> list[Network]:
    """PPO's reference, which with LoRA is the adapter switched off, and its reward model."""
    if run.method != "ppo":
        return []
    reference = [] if run.lora_r else [backbone(run, trained=False, head=True)]
    return [*reference, *([scorer(run, trained=False)] if run.reward_model else [])]


def weights_of(networks: list[Network]) -> list[Weight]:
    """All parameters."""
    return [weight for network in networks for unit in network for weight in unit]


def parameters(network: Network) -> int:
    """How many numbers a network has."""
    return sum(weight.rows * weight.columns for weight in weights_of([network]))
