"""The README.md of an exported model: what it is, where it comes from, how good it is, how to load it, and its limits.

What is not known is left out, or called unknown; nothing is made up. Local folders are named by their last part only.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCardData, try_to_load_from_cache
from huggingface_hub.repocard import metadata_load

from .pretrained import PACKAGE_PREFIX, resolve
from .provenance import masked

CARD = "README.md"
MARK = "<!-- Written by lightning-rlhf. A card without this line is not replaced by the next export. -->"
UNKNOWN = "unknown"
SETTINGS = (  # in this order, those that a module has
    "objective advantage aggregation beta gamma gae_lambda clip_range clip_range_value kl_coef kl_target kl_in "
    "kl_estimator label_smoothing robust desirable_weight undesirable_weight group_size rollout_batch_size "
    "minibatch_size num_passes max_new_tokens temperature reward reward_weights learning_rate lr_scheduler "
    "warmup_ratio weight_decay lora_r lora_alpha lora_last_layers load_in_4bit dtype"
)


class Method(NamedTuple):
    """What a card says of a method."""

    name: str
    tag: str
    learns_from: str
    paper: str
    is_reward_model: bool = False


METHODS = {  # by the module's name
    "SFTModule": Method("supervised fine-tuning", "sft", "texts, or prompts with completions", "2203.02155"),
    "RewardModule": Method("reward modelling", "reward-model", "what people prefer", "2203.02155", True),
    "PPOModule": Method("PPO", "ppo", "rewards of its own responses, with a value model", "1707.06347"),
    "GRPOModule": Method("GRPO", "grpo", "rewards of groups of its own responses, without a value model", "2402.03300"),
    "OnlineDPOModule": Method("online DPO", "online-dpo", "the best and the worst of its own responses", "2402.04792"),
    "RFTModule": Method("rejection sampling fine-tuning", "rft", "the best of its own responses", "2308.01825"),
    "PreferenceModule": Method("preference optimisation", "dpo", "pairs of completions, one preferred", "2305.18290"),
    "KTOModule": Method("KTO", "kto", "completions that people called good or bad", "2402.01306"),
}
PAPERS = {  # of parts that a module is made of, by the class's name
    "GroupCentered": "2503.20783",
    "LeaveOneOut": "2402.14740",
    "WhitenedReturns": "2501.03262",
    "SequenceRatio": "2507.18071",
    "IPO": "2310.12036",
    "Hinge": "2305.10425",
    "SimPO": "2405.14734",
    "CPO": "2401.08417",
    "ORPO": "2403.07691",
}
USE = {
    False: (
        "Meant for research on learning from feedback, and as a start for further training. The model writes what its "
        "training rewarded or showed. It may state what is false, repeat what is unfair or offensive in its data, and "
        "exploit weaknesses of a reward that stood for what people want: a high reward is not proof of a good text. It "
        "was not tested for safety. Read its responses, and measure it on your own task, before anybody relies on it."
    ),
    True: (
        "Meant to compare texts of the kind that it was trained on, and as a reward for training. A score is an "
        "estimate of what the raters of its data prefer: not of truth, quality or safety, and not of what other people "
        "prefer. Scores of two texts that answer different prompts can be compared only as far as the data did. On "
        "other kinds of text it guesses, and a model that is trained against it finds its errors: look at what "
        "high scores go to."
    ),
}


class CardFacts(NamedTuple):
    """What a card is written from."""

    name: str
    """How the model is called."""
    module: str = ""
    """Name of the module's class."""
    settings: Mapping[str, Any] = {}
    """The module's hyperparameters; `model` is what the training started from."""
    adapter: bool = False
    """Only the adapter is in the folder."""
    run: Mapping[str, Any] = {}
    """What `provenance.collect` found."""
    metrics: Mapping[str, float] = {}
    """What was logged of this model."""
    before: Mapping[str, float] = {}
    """The same of the model that the training started from."""
    which: str = ""
    """Which state of the training it is, as a sentence."""
    config: str = ""
    """The run's config.yaml."""
    license: str | None = None
    """What the user says the licence is; None takes the base model's."""
    repo: str | None = None
    """Where on the hub it is to be."""


class Base(NamedTuple):
    """The model that a training started from."""

    said: str
    hub_id: str | None = None
    license: Mapping[str, str] = {}
    language: str | list[str] | None = None


def model_card(facts: CardFacts, custom_architecture: bool = False) -> str:
    """The text of a README.md with a YAML header, as the hub reads it.

    Args:
        facts: what is known.
        custom_architecture: the model's class comes with this package.
    """
    method = METHODS.get(facts.module, Method(facts.module or "lightning-rlhf", "rlhf", "its data", ""))
    base = base_of(facts.settings.get("model"))
    license = {"license": facts.license} if facts.license else base.license or {"license": UNKNOWN}
    kind = "reward model" if method.is_reward_model else "language model"
    sections = [
        MARK,
        f"# {facts.name}\n\nA {kind} trained by {method.name} from {base.said}, with lightning-rlhf: it learned from "
        f"{method.learns_from}. {facts.which}".strip(),
        "## How to load it\n\n" + loading(facts, method.is_reward_model, custom_architecture),
        "## Training\n\n" + _training(facts, method),
        "## Data\n\n" + _data(facts.run.get("data")),
        "## Metrics\n\n" + _metrics(facts),
        "## Reproduce\n\n" + _reproduce(facts),
        "## Use and limits\n\n" + USE[method.is_reward_model],
        "## Licence\n\n" + _license(facts, base),
    ]
    header = header_of(facts, method, base, license).to_yaml()
    return f"---\n{header}\n---\n\n" + "\n\n".join(sections) + "\n"


def write_card(folder: str | Path, facts: CardFacts) -> None:
    """Write the README.md of an exported folder; one that somebody else has written stays."""
    path, config = Path(folder, CARD), Path(folder, "config.json")
    if path.exists() and MARK not in path.read_text(encoding="utf-8"):
        return
    kind = json.loads(config.read_text(encoding="utf-8")).get("model_type", "") if config.exists() else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(model_card(facts, kind.startswith("lightning_rlhf")), encoding="utf-8")


def composed(module: Any) -> dict[str, str]:
    """Names of the classes that a module is made of, where they are not among its hyperparameters."""
    parts = {name: getattr(module, name, None) for name in ("objective", "advantage", "aggregation")}
    return {name: type(part).__name__ for name, part in parts.items() if part is not None}


# --- where it comes from ----------------------------------------------------------------------------------------------


def base_of(spec: Any) -> Base:
    """What can be said of a model spec; licence and language come from its own card, if that is on this machine."""
    if not isinstance(spec, str):
        return Base("a model that was given as an object")
    if spec.startswith(PACKAGE_PREFIX):
        return Base(f"the weights in the Python package `{spec.removeprefix(PACKAGE_PREFIX)}`")
    folder, cached = Path(resolve(spec)), None
    if not folder.is_dir():
        cached = try_to_load_from_cache(spec, CARD) if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", spec) else None
    card = folder / CARD if folder.is_dir() else Path(cached) if isinstance(cached, str) else None
    header = _header(card) if card is not None and card.is_file() else {}
    license = {name: header[name] for name in ("license", "license_name", "license_link") if header.get(name)}
    license = {} if license.get("license", UNKNOWN) == UNKNOWN else license
    if not folder.is_dir():
        return Base(f"[{spec}](https://huggingface.co/{spec})", spec, license, header.get("language"))
    origin = header.get("base_model")
    origin = origin if isinstance(origin, str) else None
    said = f"`{folder.name}`" + (f", which comes from {origin}" if origin else "")
    return Base(said, origin, license, header.get("language"))


def _header(card: Path) -> dict[str, Any]:
    try:
        return metadata_load(card) or {}
    except Exception:  # somebody else's file, in whatever state
        return {}


def header_of(facts: CardFacts, method: Method, base: Base, license: Mapping[str, str]) -> ModelCardData:
    """The YAML header."""
    data = facts.run.get("data") or {}
    sources = data.get("sources", {}).values()
    on_hub = sorted({source["name"].partition(":")[0] for source in sources if source["hub"]})
    trained_on = (on_hub or source_names(data) or [UNKNOWN])[0]
    task = "text-classification" if method.is_reward_model else "text-generation"
    results = [
        EvalResult(task_type=task, dataset_type=trained_on, dataset_name=trained_on, metric_type=name, metric_value=x)
        for name, x in held_out(facts.metrics).items()
    ]
    return ModelCardData(
        base_model=base.hub_id,
        datasets=on_hub or None,
        eval_results=results or None,
        language=base.language,
        library_name="peft" if facts.adapter else "transformers",
        model_name=facts.name if results else None,
        pipeline_tag=task,
        tags=["lightning-rlhf", "rlhf", method.tag, *(["lora"] if facts.adapter else [])],
        **license,
    )


# --- sections ---------------------------------------------------------------------------------------------------------


def loading(facts: CardFacts, is_reward_model: bool, custom_architecture: bool) -> str:
    """Python that loads the model."""
    load = "AutoPeftModelFor" if facts.adapter else "AutoModelFor"
    library = "peft" if facts.adapter else "transformers"
    load += "SequenceClassification" if is_reward_model else "CausalLM"
    lines = ["import torch"] if is_reward_model else []
    lines += ["import lightning_rlhf.modules  # knows this architecture"] if custom_architecture else []
    lines += ["from peft import " + load] if facts.adapter else []
    lines += [f"from transformers import {'' if library == 'peft' else load + ', '}AutoTokenizer", ""]
    lines += [f"folder = {facts.repo or facts.name!r}  # this folder, or its id on the hub"]
    lines += ["tokenizer = AutoTokenizer.from_pretrained(folder)"]
    lines += [f"model = {load}.from_pretrained(folder{', num_labels=1' if is_reward_model else ''}).eval()", ""]
    if not is_reward_model:
        lines += ['inputs = tokenizer("Once upon a time", return_tensors="pt")']
        lines += ["output = model.generate(**inputs, max_new_tokens=64, do_sample=True)"]
        lines += ["print(tokenizer.decode(output[0], skip_special_tokens=True))"]
        return "\n".join(["```python", *lines, "```"])
    lines += ["text = 'prompt and response'  # one at a time: it is read at its last token, EOS"]
    lines += ["ids = torch.tensor([[*tokenizer(text)['input_ids'], tokenizer.eos_token_id]])"]
    lines += ["model.config.pad_token_id = None"]
    lines += ["with torch.no_grad():", "    raw = model(input_ids=ids).logits.item()", "print(raw)"]
    scale = "`reward_normalizer.json`" if facts.adapter else "`config.json` (`reward_mean`, `reward_std`)"
    note = (
        f"The score that lightning-rlhf trains with is (raw - mean) / std, with mean and std from {scale}, or 0 and 1 "
        "where they are not there. There, give this folder as `--model.reward`."
    )
    return "\n".join(["```python", *lines, "```", "", note])


def _training(facts: CardFacts, method: Method) -> str:
    without_lora = () if facts.settings.get("lora_r") else ("lora_",)
    told = [name for name in SETTINGS.split() if name in facts.settings and not name.startswith(without_lora)]
    values = {name: facts.settings[name] for name in told}
    shown = {name: _short(value) for name, value in values.items() if value is not None and value is not False}
    papers = [method.paper, *(PAPERS.get(value, "") for value in shown.values())]
    links = ", ".join(f"[arXiv:{paper}](https://arxiv.org/abs/{paper})" for paper in dict.fromkeys(papers) if paper)
    text = f"Method: {method.name}" + (f" ({links})" if links else "") + "."
    if facts.module == "PPOModule":
        text += " The value model is in the run's checkpoints, not in this folder."
    return text + ("\n\n" + _table(("setting", "value"), shown.items()) if shown else "")


def _short(value: Any) -> str:
    """A setting as one word, if it can be: the class of what has a `class_path`, the last part of a folder."""
    if isinstance(value, Mapping):
        path = str(value.get("class_path", value.get("name", "a mapping")))
        return path.rpartition(".")[2]
    if isinstance(value, list | tuple):
        return ", ".join(_short(item) for item in value)
    text = masked(str(value))
    return Path(text).name if "://" not in text and Path(text).is_absolute() else text


def _data(data: Mapping[str, Any] | None) -> str:
    if not data:
        return "Not recorded."
    sources = [f"`{name}`" for name in source_names(data)]
    said = f"`{data['module']}`" + (f" with {', '.join(sources)}." if sources else ".")
    rows = []
    for name, split in data.get("splits", {}).items():
        columns = ", ".join(f"`{column}`" for column in split["columns"])
        rows.append((name, split["rows"], columns, f"`{split['sha256'][:16]}` of {split['hashed_rows']} rows"))
    return said + ("\n\n" + _table(("split", "rows", "columns", "sha256"), rows) if rows else "")


def source_names(data: Mapping[str, Any]) -> list[str]:
    """Hub ids, and the last parts of local paths."""
    sources = data.get("sources", {}).values()
    return list(dict.fromkeys(s["name"] if s["hub"] else s["name"].rpartition("/")[2] for s in sources))


def held_out(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of held-out data that are numbers."""
    named = {name: x for name, x in metrics.items() if name.startswith(("val/", "test/"))}
    return {name: x for name, x in sorted(named.items()) if math.isfinite(x)}


def _metrics(facts: CardFacts) -> str:
    after, before = held_out(facts.metrics), held_out(facts.before)
    if not after:
        return "This model was not measured on held-out data during its training."
    if not before:
        return "On held-out data:\n\n" + _table(("metric", "value"), ((n, f"{x:.4g}") for n, x in after.items()))
    rows = [(name, f"{before[name]:.4g}" if name in before else "", f"{x:.4g}") for name, x in after.items()]
    return "On held-out data, before and after this training:\n\n" + _table(("metric", "before", "after"), rows)


def _reproduce(facts: CardFacts) -> str:
    run, parts = facts.run, []
    if run.get("command"):
        parts.append(f"```bash\n{run['command']}\n```")
    if facts.config:
        config = f"```yaml\n{masked(facts.config).strip()}\n```"
        parts.append(f"<details><summary>config.yaml</summary>\n\n{config}\n\n</details>")
    if run.get("seed") is not None:
        parts.append(f"Seed {run['seed']}, processes: {run.get('world_size', 1)}.")
    if git := run.get("git"):
        parts.append(f"Git commit `{git['commit']}`{', with uncommitted changes' if git['dirty'] else ''}.")
    if versions := run.get("versions"):
        parts.append(", ".join(f"{name} {version}" for name, version in versions.items() if version) + ".")
    return "\n\n".join(parts) or "Not recorded."


def _license(facts: CardFacts, base: Base) -> str:
    if facts.license:
        return (
            f"{facts.license}, as given for this export. The licences of the base model and of the data hold as well."
        )
    if base.license:
        named = base.license.get("license_name", base.license["license"])
        return f"{named}, that of the base model. The licence of the data may add to it."
    return (
        "Unknown: neither this export nor the base model's card says. Find out under which terms the base model and "
        "the data may be used before you use or share this model."
    )


def _table(head: tuple[str, ...], rows: Iterable[tuple]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
