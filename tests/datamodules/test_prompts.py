import lightning as L
import pytest
import torch
from datasets import Dataset

from lightning_rlhf.datamodules import PromptDataModule, prompts
from lightning_rlhf.datamodules.prompts import PromptStream, pass_order

U = {"role": "user", "content": "hi"}


def make(tokenizer, data, **kwargs) -> PromptDataModule:
    data = Dataset.from_list(data) if isinstance(data, list) else data
    module = PromptDataModule(data, tokenizer=tokenizer, **kwargs)
    module.prepare_data()
    module.setup("fit")
    return module


def batch(tokenizer, data, **kwargs) -> dict:
    module = make(tokenizer, data, **kwargs)
    found = module.collate_function()(list(module.ready("train")))
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in found.items()}


def test_left_padding_and_columns(char_tokenizer):
    assert batch(char_tokenizer, [{"prompt": "ab", "answer": 1}, {"prompt": "c", "answer": 2}]) == {
        "input_ids": [[97, 98], [0, 99]],
        "attention_mask": [[1, 1], [0, 1]],
        "prompts": ["ab", "c"],
        "columns": {"answer": [1, 2]},
    }


def test_messages(char_tokenizer):
    found = batch(char_tokenizer, [{"prompt": [U]}])
    assert found["prompts"] == ["u>hi<eos>\na>"]
    assert found["input_ids"] == [[117, 62, 104, 105, 0, 10, 97, 62]]


def test_default_special_tokens(bos_tokenizer):
    found = batch(bos_tokenizer, [{"prompt": "ab"}])
    assert found["input_ids"] == [[2, 97, 98]]
    assert found["prompts"] == ["ab"]


def test_openings(char_tokenizer, bos_tokenizer, monkeypatch):
    said = []
    monkeypatch.setattr(prompts, "rank_zero_info", said.append)
    rows = [{"text": "abcd", "rating": 1}, {"text": "ab", "rating": 2}, {"text": "xyz", "rating": 3}]
    for tokenizer, bos in [(char_tokenizer, []), (bos_tokenizer, [2])]:
        found = batch(tokenizer, rows, opening_tokens=2)
        assert found["input_ids"] == [[*bos, 97, 98], [*bos, 120, 121]]  # "ab" has no third token to go on with
        assert found["prompts"] == ["ab", "xy"]
        assert found["columns"] == {"rating": [1, 3]}
    assert said == ["1 of 3 texts have no more than `opening_tokens`=2 tokens, and are left out"] * 2


def test_columns(char_tokenizer):
    row = {"prompt": "p", "question": "q", "text": "tt", "body": "bb"}
    found = batch(char_tokenizer, [row], prompt_column="question")
    assert found["prompts"] == ["q"]
    assert found["columns"] == {"prompt": ["p"], "text": ["tt"], "body": ["bb"]}
    assert batch(char_tokenizer, [row])["prompts"] == ["p"]
    assert batch(char_tokenizer, [row], opening_tokens=1)["prompts"] == ["t"]
    assert batch(char_tokenizer, [row], opening_tokens=1, text_column="body")["prompts"] == ["b"]


def test_csv_with_input(char_tokenizer, tmp_path):
    (tmp_path / "d.csv").write_text("input,output\na,b\n")
    found = batch(char_tokenizer, str(tmp_path / "d.csv"))
    assert (found["prompts"], found["columns"]) == (["a"], {"output": ["b"]})


def test_long_prompts(char_tokenizer):
    rows = [{"prompt": "abcdef"}, {"prompt": "xyz"}]
    with pytest.warns(UserWarning, match=r"1 of 2 prompts have more than `max_prompt_length`=3 .*cut to their end"):
        found = batch(char_tokenizer, rows, max_prompt_length=3)
    assert found["input_ids"] == [[100, 101, 102], [120, 121, 122]]
    assert found["prompts"] == ["def", "xyz"]
    with pytest.warns(UserWarning, match="1 of 2 prompts .* are left out"):
        assert batch(char_tokenizer, rows, max_prompt_length=3, long_prompts="drop")["prompts"] == ["xyz"]
    with pytest.raises(ValueError, match=r"the prompt 'abcdef'... has 6 tokens, more than `max_prompt_length`=3"):
        make(char_tokenizer, rows, max_prompt_length=3, long_prompts="error")


@pytest.mark.parametrize(
    ("row", "kwargs", "message"),
    [
        ({"prompt": ""}, {}, "row 0 .*the prompt is empty"),
        ({"prompt": None}, {}, "row 0 .*the prompt must be text"),
        ({"text": "a"}, {}, "no prompt column but text; give `opening_tokens` or `prompt_column`"),
        ({"x": "a"}, {}, r"no prompt column \(looked for prompt, input, query"),
        ({"x": "a"}, {"opening_tokens": 1}, "no text column"),
        ({"text": " "}, {"opening_tokens": 1}, "row 0 .*text is empty"),
        ({"text": "a"}, {"opening_tokens": 1}, "no train row is left within the length limits"),
        ({"prompt": "a"}, {"long_prompts": "cut"}, "`long_prompts` must be truncate, drop or error, not 'cut'"),
        ({"prompt": "a"}, {"text_column": "prompt"}, "`text_column` has no effect without `opening_tokens`"),
        ({"prompt": "a"}, {"opening_tokens": 1, "prompt_column": "prompt"}, "`prompt_column` has no effect with"),
        (
            {"text": "a"},
            {"opening_tokens": 9, "max_prompt_length": 8},
            "`opening_tokens`=9 exceeds `max_prompt_length`=8",
        ),
        ({"prompt": "a"}, {"max_prompt_length": 0}, "`max_prompt_length` must be at least 1"),
    ],
)
def test_errors(char_tokenizer, row, kwargs, message, monkeypatch):
    monkeypatch.setattr(prompts, "rank_zero_info", lambda message: None)
    with pytest.raises(ValueError, match=message):
        make(char_tokenizer, [row], **kwargs)


# The stream


def stream(size: int, seed: int = 0, rank: int = 0, world_size: int = 1) -> PromptStream:
    return PromptStream(range(size), list, seed, rank, world_size)


@pytest.mark.parametrize("size", [1, 7, 12])
def test_stream_covers_every_pass(size):
    """Takes that do not divide the data: each pass still holds every row once."""
    one = stream(size)
    taken = [row for _ in range(3 * size) for row in one.take(5)]
    for k in range(len(taken) // size):
        assert sorted(taken[k * size : (k + 1) * size]) == list(range(size))


def test_processes_are_disjoint_and_cover():
    ranks = [stream(7, rank=rank, world_size=2) for rank in (0, 1)]
    rounds = [[each.take(2) for each in ranks] for _ in range(7)]  # 28 prompts: four passes
    alone = stream(7)
    # Together they walk the order that one process walks.
    assert [first + second for first, second in rounds] == [alone.take(4) for _ in range(7)]


def test_order_depends_on_seed_and_pass():
    assert len({tuple(pass_order(seed, k, 20)) for seed in range(3) for k in range(3)}) == 9
    assert stream(20, seed=1).take(20) != stream(20, seed=2).take(20)
    assert pass_order(0, 1, 20) != pass_order(1, 0, 20)


def test_resume_goes_on():
    whole = stream(7)
    expected = [whole.take(3) for _ in range(6)]
    first, second = stream(7), stream(7)
    found = [first.take(3) for _ in range(2)]
    second.load_state_dict(first.state_dict())
    assert found + [second.take(3) for _ in range(4)] == expected
    with pytest.raises(ValueError, match="`n` must be at least 1"):
        first.take(0)


def test_state_of_the_datamodule(char_tokenizer):
    rows = [{"prompt": letter} for letter in "abcdefg"]
    whole, first = make(char_tokenizer, rows), make(char_tokenizer, rows)
    expected = [whole.prompts.take(3)["prompts"] for _ in range(3)]
    assert first.state_dict() == {"cursor": 0}
    assert first.prompts.take(3)["prompts"] == expected[0]
    assert first.state_dict() == {"cursor": 3}
    before_setup = PromptDataModule(Dataset.from_list(rows), tokenizer=char_tokenizer)
    before_setup.load_state_dict(first.state_dict())
    assert before_setup.state_dict() == {"cursor": 3}
    before_setup.setup()
    assert before_setup.prompts.take(3)["prompts"] == expected[1]
    before_setup.load_state_dict({"cursor": 6})
    assert before_setup.prompts.take(3)["prompts"] == expected[2]
    assert make(char_tokenizer, rows, seed=1).prompts.take(7)["prompts"] != expected[0] + expected[1] + expected[2][:1]


class Plain(L.LightningModule):
    """Sees batches of prompts."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.held_out = [], []

    def training_step(self, batch, index):
        self.seen += batch["prompts"]
        return self.weight

    def validation_step(self, batch, index):
        self.held_out += batch["prompts"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class OnPolicy(Plain):
    """Takes over the training loader, and takes three prompts an epoch."""

    def experience_dataloader(self, stream):
        self.stream = stream
        return torch.utils.data.DataLoader([{"prompts": ["minibatch"]}], batch_size=None)

    def on_train_epoch_start(self):
        self.seen.append(self.stream.take(3)["prompts"])


def fit(module, data, tmp_path, epochs, **kwargs) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = L.Trainer(accelerator="cpu", devices=1, max_epochs=epochs, default_root_dir=tmp_path, **quiet)
    trainer.fit(module, datamodule=data, **kwargs)
    return trainer


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*smaller than the logging", "ignore:.*GPU")
def test_with_lightning(char_tokenizer, tmp_path):
    def data():
        rows = Dataset.from_list([{"prompt": letter} for letter in "abcdefg"])
        return PromptDataModule(rows, val_data=Dataset.from_list([{"prompt": "xy"}]), tokenizer=char_tokenizer)

    plain, whole, first, second = Plain(), OnPolicy(), OnPolicy(), OnPolicy()
    fit(plain, data(), tmp_path, 1)
    assert sorted(plain.seen) == list("abcdefg")
    assert set(plain.held_out) == {"xy"}

    fit(whole, data(), tmp_path, 3)
    fit(first, data(), tmp_path, 1).save_checkpoint(tmp_path / "one.ckpt")
    fit(second, data(), tmp_path, 3, ckpt_path=tmp_path / "one.ckpt")
    assert whole.seen == first.seen + second.seen  # minibatches stand between, alike in both
