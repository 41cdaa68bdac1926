"""The card: its header is one that the hub reads, its code loads the model, and it says nothing that is not known."""

import json
import math
import re

import pytest
import torch
from conftest import make_llama, make_tokenizer
from huggingface_hub import ModelCard
from peft import PeftModel

from lightning_rlhf.model_card import MARK, METHODS, CardFacts, base_of, composed, model_card, write_card
from lightning_rlhf.modules import GRPOModule, RewardModule, SFTModule
from lightning_rlhf.modules import __all__ as shipped
from lightning_rlhf.modules.compositions import LeaveOneOut
from lightning_rlhf.modules.scoring import ModelReward, Responses

RUN = {
    "command": "python train.py fit --model PPOModule",
    "seed": 7,
    "world_size": 2,
    "versions": {"python": "3.11", "torch": "2.9", "peft": None},
    "git": {"commit": "abc123", "branch": "main", "dirty": True},
    "data": {
        "module": "PromptDataModule",
        "sources": {
            "data": {"name": "owner/prompts:small", "hub": True},
            "val_data": {"name": "/home/me/held_out.csv", "hub": False},
        },
        "splits": {"train": {"rows": 12, "columns": ["__a__"], "sha256": "0123456789abcdef00", "hashed_rows": 10}},
    },
}
FACTS = CardFacts(
    name="better",
    module="PPOModule",
    settings={"model": "owner/base", "kl_coef": 0.0, "kl_target": None, "lora_r": 0, "lora_alpha": 32, "robust": False},
    run=RUN,
    metrics={"val/reward": 1.5, "val/kl": math.nan, "train/loss": 9.25, "val/new": 3.0},
    before={"val/reward": -0.5},
    which="The best one.",
    config="model: x\ntoken: swordfish\n",
)


def header(text: str) -> dict:
    return ModelCard(text).data.to_dict()


class TestHeader:
    def test_is_what_the_hub_reads(self):
        found = header(model_card(FACTS))
        results = found.pop("model-index")
        assert found == {
            "base_model": "owner/base",
            "datasets": ["owner/prompts"],
            "library_name": "transformers",
            "license": "unknown",
            "pipeline_tag": "text-generation",
            "tags": ["lightning-rlhf", "rlhf", "ppo"],
        }
        metrics = results[0]["results"][0]["metrics"]
        assert {m["type"]: m["value"] for m in metrics} == {"val/reward": 1.5, "val/new": 3.0}
        assert results[0]["name"] == "better"
        assert results[0]["results"][0]["dataset"]["name"] == "owner/prompts"

    def test_of_an_adapter_of_a_reward_model(self):
        found = header(model_card(FACTS._replace(module="RewardModule", adapter=True)))
        assert (found["library_name"], found["pipeline_tag"]) == ("peft", "text-classification")
        assert found["tags"] == ["lightning-rlhf", "rlhf", "reward-model", "lora"]

    def test_a_local_base_and_local_data_are_not_ids_of_the_hub(self, tiny_model):
        data = {"module": "M", "sources": {"data": {"name": "/home/me/rows.csv", "hub": False}}, "splits": {}}
        found = header(model_card(FACTS._replace(settings={"model": tiny_model}, run={"data": data})))
        assert not {"base_model", "datasets"} & found.keys()
        assert found["model-index"][0]["results"][0]["dataset"]["name"] == "rows.csv"

    def test_without_metrics_there_are_no_results(self):
        assert "model-index" not in header(model_card(FACTS._replace(metrics={"train/loss": 1.0})))


class TestBody:
    def test_tells_what_is_known(self):
        text = model_card(FACTS)
        for said in (
            "# better\n\nA language model trained by PPO from [owner/base](https://huggingface.co/owner/base)",
            "The best one.",
            "https://arxiv.org/abs/1707.06347",
            "| kl_coef | 0.0 |",
            "`PromptDataModule` with `owner/prompts:small`, `held_out.csv`.",
            "| train | 12 | `__a__` | `0123456789abcdef` of 10 rows |",
            "| metric | before | after |\n| --- | --- | --- |\n| val/new |  | 3 |\n| val/reward | -0.5 | 1.5 |",
            "python train.py fit --model PPOModule\n",
            "model: x\n",
            "Seed 7, processes: 2.",
            "`abc123`, with uncommitted changes",
            "python 3.11, torch 2.9.",
            "a high reward is not proof of a good text",
            "Unknown: neither this export nor the base model's card says.",
        ):
            assert said in text
        for unsaid in ("lora_alpha", "kl_target", "robust", "peft None", "/home/me", "swordfish", "train/loss", "nan"):
            assert unsaid not in text

    def test_says_so_where_nothing_is_known(self):
        text = model_card(CardFacts("x"))
        assert "a model that was given as an object" in text
        assert text.count("Not recorded.") == 2
        assert "not measured on held-out data" in text
        assert header(text)["license"] == "unknown"

    def test_a_clean_commit_is_not_called_changed(self):
        git = {"commit": "abc123", "branch": None, "dirty": False}
        assert "`abc123`.\n" in model_card(FACTS._replace(run={"git": git}))

    def test_metrics_without_a_before(self):
        assert "| metric | value |" in model_card(FACTS._replace(before={}))

    def test_lora_and_the_classes_that_a_module_is_made_of(self, tiny_model):
        module = GRPOModule(tiny_model, lora_r=4, advantage=LeaveOneOut(), rollout_batch_size=8, minibatch_size=8)
        text = model_card(CardFacts("x", "GRPOModule", {**module.hparams, **composed(module)}))
        for said in ("| lora_r | 4 |", "| lora_alpha | 32 |", "| advantage | LeaveOneOut |", "abs/2402.14740"):
            assert said in text
        assert "abs/2507.18071" not in text

    def test_settings_in_the_form_of_a_config(self):
        rewards = ["/home/me/runs/judge", {"class_path": "pkg.ExactMatch", "init_args": {}}, "http://me:pw@host/x"]
        text = model_card(CardFacts("x", "PPOModule", {"reward": rewards}))
        assert "| reward | judge, ExactMatch, http://***@host/x |" in text

    def test_every_module_that_is_exported_is_known(self):
        assert METHODS.keys() == set(shipped) - {"TextModule", "BestOfNModule"}


# --- licence ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path):
    """A local base model's folder with a card that says what is given."""

    def make(card: str) -> str:
        folder = tmp_path / "base"
        folder.mkdir(exist_ok=True)
        (folder / "README.md").write_text(card)
        return str(folder)

    return make


class TestLicence:
    def test_is_that_of_the_bases_card(self, base):
        folder = base("---\nlicense: mit\nlanguage: [en, de]\nbase_model: owner/first\n---\ntext")
        text = model_card(FACTS._replace(settings={"model": folder}))
        assert header(text).items() >= {"license": "mit", "language": ["en", "de"], "base_model": "owner/first"}.items()
        assert "## Licence\n\nmit, that of the base model." in text
        assert "from `base`, which comes from owner/first," in text

    def test_one_of_its_own_is_linked(self, base):
        said = {"license": "other", "license_name": "llama3", "license_link": "https://example.org/l"}
        folder = base("---\n" + "".join(f"{name}: {value}\n" for name, value in said.items()) + "---\n")
        text = model_card(FACTS._replace(settings={"model": folder}))
        assert header(text).items() >= said.items()
        assert "llama3, that of the base model" in text

    def test_the_users_word_comes_first(self, base):
        text = model_card(FACTS._replace(settings={"model": base("---\nlicense: mit\n---\n")}, license="apache-2.0"))
        assert header(text)["license"] == "apache-2.0"
        assert "apache-2.0, as given for this export" in text

    @pytest.mark.parametrize(
        "card", ["", "no header", "---\nlicense: [\n---\n", "---\nlicense: unknown\n---\n", "---\n- a\n---\n"]
    )
    def test_is_unknown_if_nobody_says(self, card, base):
        text = model_card(FACTS._replace(settings={"model": base(card)}))
        assert header(text)["license"] == "unknown"
        assert "## Licence\n\nUnknown: neither" in text

    def test_of_a_hub_id_comes_from_the_cache(self, base, monkeypatch):
        card = base("---\nlicense: mit\n---\n") + "/README.md"
        monkeypatch.setattr("lightning_rlhf.model_card.try_to_load_from_cache", lambda *_: card)
        assert base_of("owner/name")[1:3] == ("owner/name", {"license": "mit"})
        monkeypatch.setattr("lightning_rlhf.model_card.try_to_load_from_cache", lambda *_: None)
        assert base_of("owner/name")[1:3] == ("owner/name", {})


# --- files ------------------------------------------------------------------------------------------------------------


def test_only_a_card_of_ours_is_replaced(tmp_path):
    write_card(tmp_path / "model", FACTS)
    assert MARK in (tmp_path / "model/README.md").read_text()
    write_card(tmp_path / "model", FACTS._replace(name="other"))
    assert "# other" in (tmp_path / "model/README.md").read_text()
    (tmp_path / "model/README.md").write_text("mine")
    write_card(tmp_path / "model", FACTS)
    assert (tmp_path / "model/README.md").read_text() == "mine"


def test_code_for_an_architecture_of_this_package_imports_it(tmp_path):
    for kind, imports in (("llama", False), ("lightning_rlhf_lstm", True)):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        write_card(tmp_path, FACTS)
        assert ("import lightning_rlhf.modules" in (tmp_path / "README.md").read_text()) == imports


# --- the code in it ---------------------------------------------------------------------------------------------------

TEXT = "prompt and response"


def exported(kind, folder, merge, tmp_path, monkeypatch):
    """A module with weights that were moved, exported with its card."""
    make_llama().save_pretrained(tmp_path / "lm")
    make_tokenizer().save_pretrained(tmp_path / "lm")
    module = kind(str(tmp_path / "lm"), lora_r=2)
    module.configure_model()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    if kind is RewardModule:
        module.network.set_normalizer(0.5, 2.0)
    module.save_pretrained(folder, merge=merge)
    write_card(folder, CardFacts(folder.name, kind.__name__, module.hparams, adapter=not merge))
    monkeypatch.chdir(folder.parent)
    return module


def run_code(folder) -> dict:
    """The variables that the card's Python leaves."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    variables: dict = {}
    exec(code, variables)
    return variables


@pytest.mark.parametrize("merge", [True, False], ids=["whole", "adapter"])
class TestTheCode:
    def test_loads_a_policy(self, merge, tmp_path, monkeypatch, capsys):
        module = exported(SFTModule, tmp_path / "model", merge, tmp_path, monkeypatch)
        found = run_code(tmp_path / "model")
        assert isinstance(found["model"], PeftModel) != merge
        ids = found["inputs"]["input_ids"]
        with torch.no_grad():
            expected = module.network(input_ids=ids).logits
            torch.testing.assert_close(found["model"](input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert capsys.readouterr().out.startswith("Once upon a time")

    def test_scores_as_the_reward_does(self, merge, tmp_path, monkeypatch):
        exported(RewardModule, tmp_path / "model", merge, tmp_path, monkeypatch)
        found = run_code(tmp_path / "model")
        score = ModelReward(str(tmp_path / "model"))(Responses([TEXT], [""])).item()
        assert (found["raw"] - 0.5) / 2.0 == pytest.approx(score, abs=1e-4)
        said = (tmp_path / "model/README.md").read_text()
        assert ("reward_normalizer.json" if not merge else "`reward_mean`, `reward_std`") in said
