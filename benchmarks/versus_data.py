"""What both sides of `versus.py` learn from: models, prompts, pairs and texts, made once and written to folders.

Texts are common English words in random order, one token each, so that their lengths are exactly those that were drawn
and nothing is downloaded.
"""

import json
import math
import random
import shutil
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path

import torch
import transformers
from model_shapes import Shape
from small_llama import llama_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lightning_rlhf.loaders import EvenBatches
from lightning_rlhf.modules import RewardModule
from lightning_rlhf.modules.rollout import Sampling, row_noise, sample
from lightning_rlhf.pretrained import load_tokenizer, resolve

TINY = "tiny"
COMMON = """
a about after again air all also always an and animal answer any are as ask at away back be because been before began
below best better big black book both boy bring but by call came can car change child city close come could country cut
day did do does done door down draw each earth eat end even ever every eye face fall family far farm father feel few
find fire first fish five fly follow food for form found four friend from full gave get girl give go good got great
green group grow had half hand hard has have he head hear help her here high him his hold home horse hot hour house how
hundred I idea if in into is it its just keep kind king knew know land large last late later learn leave left let letter
life light like line list little live long look low made make man many mark may me mean men might mile moon more morning
most mother move much music must my name near need never new next night no north not nothing now number of off often old
on once one only open or order other our out over own page paper part pass people picture place plan plant play point
"""
WORDS = COMMON.split()
PROMPT_TOKENS = 8
MEAN_LENGTH = 25.0
"""Tokens of a response by the model that ends early."""
COMPLETION_TOKENS, TEXT_TOKENS, LINE_TOKENS = (20, 120), (20, 160), 32
SAMPLED = 256
"""Responses whose mean length is measured."""


def prepare(folder: Path, model: str, data: str, rows: int, batch: int) -> dict[str, str]:
    """Folders and files of a case, made where they are missing.

    Args:
        folder: for everything.
        model: a spec as every `model` flag takes it, or `tiny`.
        data: prompts, prompts that the model `ends` early, pairs, texts, or texts of equal length, `lines`.
        rows: how many.
        batch: rows of one optimizer step, for the order of pairs and texts.

    Returns:
        `policy`, `reward`, `reward_adapter`, and the data for `own` and for the `peer`.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    place = folder / "".join(c if c.isalnum() else "_" for c in model)
    policy = once(place / "policy", lambda path: write_policy(model, path))
    reward = once(place / "reward", lambda path: write_reward(policy, path))
    adapter = once(place / "reward_adapter", lambda path: write_reward_adapter(policy, path))
    networks = {"policy": str(policy), "reward": str(reward), "reward_adapter": str(adapter)}
    tokenizer = AutoTokenizer.from_pretrained(policy)
    if data == "ends":
        networks["policy"] = str(once(place / "policy_that_ends", lambda path: write_ending(policy, path)))
    kind = "prompts" if data == "ends" else data
    own = once(place / f"{kind}_{rows}.jsonl", lambda path: write_rows(path, make_rows(kind, tokenizer, rows)))
    if kind == "prompts":
        return networks | {"own": str(own), "peer": str(own)}
    peer = once(place / f"{kind}_{rows}_as_drawn.jsonl", lambda path: write_rows(path, as_drawn(own, batch)))
    return networks | {"own": str(own), "peer": str(peer)}


def once(path: Path, write: Callable[[Path], None]) -> Path:
    """The path, written whole if it is not there yet."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        if partial.is_dir():
            shutil.rmtree(partial)
        write(partial)
        partial.rename(path)
    return path


# --- models -----------------------------------------------------------------------------------------------------------


def write_policy(spec: str, folder: Path) -> None:
    """The model in bfloat16, and its tokenizer with a pad token that is not EOS: TRL's PPO knows padding by its id."""
    if spec == TINY:
        model, tokenizer = tiny_model()
    else:
        tokenizer = load_tokenizer(spec)
        model = AutoModelForCausalLM.from_pretrained(resolve(spec), dtype=torch.bfloat16)
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        others = [token for token in tokenizer.all_special_tokens if token != tokenizer.eos_token]
        if not others:
            raise ValueError(f"`--model`: the tokenizer of {spec} must have a special token to pad with beside its EOS")
        tokenizer.pad_token = others[-1]
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tiny_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A random Llama of 2 layers and 64 hidden units that knows `WORDS`."""
    vocabulary = {"<eos>": 0, "<pad>": 1} | {word: i for i, word in enumerate(WORDS, start=2)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    shape = Shape(2, 64, heads=4, kv_heads=2, head_dim=16, intermediate=128, vocabulary=len(vocabulary), tied=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(llama_config(shape))
    return model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def write_reward(policy: Path, folder: Path) -> None:
    """The same network with a random scalar head."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(policy).save_pretrained(folder)


def write_reward_adapter(policy: Path, folder: Path) -> None:
    """A new reward model as an adapter of the policy's own weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = RewardModule(str(policy), dtype="bfloat16", lora_r=16)
        module.configure_model()
    module.save_pretrained(folder, merge=False)


def write_ending(policy: Path, folder: Path) -> None:
    """The model with another EOS row in its head, so that responses have `MEAN_LENGTH` tokens, most of them fewer.

    With h̄ the mean hidden state that the head reads, row = α h̄ / |h̄|²: the logit of EOS is then about α everywhere, and
    lengths are about geometric. α is found by bisection, on samples from the same noise.
    """
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(policy)
    texts = [row["text"] for row in make_rows("texts", tokenizer, SAMPLED)]
    prompts = torch.tensor([tokenizer(text)["input_ids"][:PROMPT_TOKENS] for text in texts])
    row = model.get_output_embeddings().weight[tokenizer.eos_token_id]
    with torch.no_grad():
        hidden = model(prompts, output_hidden_states=True).hidden_states[-1].float().mean((0, 1))

    @torch.no_grad()
    def mean_length(alpha: float) -> float:
        row.copy_(alpha * hidden / hidden.square().sum())
        sampling = Sampling.of(model, tokenizer, max_new_tokens=128)
        noise = row_noise(range(SAMPLED), sampling.max_new_tokens, 0)
        return sample(model, prompts, torch.ones_like(prompts), sampling, noise).response_mask.sum(1).float().mean()

    mean_length(bisect(mean_length, 0.0, 60.0, MEAN_LENGTH, tolerance=2.5))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def bisect(falling: Callable[[float], float], low: float, high: float, target: float, tolerance: float) -> float:
    """x in [low, high] where a falling function is within `tolerance` of `target`."""
    for _ in range(20):
        middle = (low + high) / 2
        found = falling(middle)
        if abs(found - target) <= tolerance:
            return middle
        low, high = (middle, high) if found > target else (low, middle)
    raise ValueError(f"no point found where the function is {target} ± {tolerance}; at {middle} it is {found}")


# --- texts ------------------------------------------------------------------------------------------------------------


def make_rows(kind: str, tokenizer: PreTrainedTokenizerBase, count: int) -> Iterable[dict[str, str]]:
    """Rows of `prompts`, `pairs`, `texts` or `lines`, the same at every call."""
    words, rng = known_words(tokenizer), random.Random(0)

    def text(length: int) -> str:
        return " ".join(rng.choices(words, k=length))

    for _ in range(count):
        if kind == "texts":
            yield {"text": text(drawn_length(rng, *TEXT_TOKENS))}
            continue
        if kind == "lines":
            yield {"text": text(LINE_TOKENS - 1)}  # an EOS follows
            continue
        row = {"prompt": text(PROMPT_TOKENS)}
        if kind == "pairs":
            row |= {name: " " + text(drawn_length(rng, *COMPLETION_TOKENS)) for name in ("chosen", "rejected")}
        yield row


def known_words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Those of `WORDS` that are one token, at the start of a text and after a space."""
    forms = {word: (word, f" {word}") for word in WORDS}
    known = [w for w in WORDS if all(len(tokenizer.encode(f, add_special_tokens=False)) == 1 for f in forms[w])]
    if len(known) < 50:
        raise ValueError(f"`--model`: its tokenizer must have 50 common words as one token, but it has {len(known)}")
    return known


def drawn_length(rng: random.Random, shortest: int, longest: int) -> int:
    """A log-normal number of tokens, its median the geometric mean of the limits, two standard deviations apart."""
    middle, spread = math.log(shortest * longest) / 2, math.log(longest / shortest) / 4
    return min(max(round(rng.lognormvariate(middle, spread)), shortest), longest)


def as_drawn(path: Path, batch: int) -> list[dict[str, str]]:
    """The rows of a file in the order in which this library's loaders shuffle them, for a peer that keeps the order."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    order = EvenBatches(len(rows), batch, num_replicas=1, rank=0, shuffle=True, seed=0)
    return [rows[i] for i in chain.from_iterable(order)]


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """As .jsonl."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
