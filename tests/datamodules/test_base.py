"""What all DataModules share, tried on `SFTDataModule`."""

import lightning as L
import pytest
import torch
from datasets import Dataset, DatasetDict
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_rlhf.datamodules import SFTDataModule, TextDataModule
from lightning_rlhf.datamodules.splits import hold_out, unit_hash

LETTERS = "abcdefghij"
ignore_lightning = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*is smaller than the logging interval",
    "ignore:.*GPU available",
    "ignore:.*when using `ckpt_path`, callbacks used to create the checkpoint",
)


def texts(letters: str = LETTERS) -> Dataset:
    return Dataset.from_dict({"text": list(letters)})


def make(tokenizer, data=None, **kwargs) -> SFTDataModule:
    module = SFTDataModule(texts() if data is None else data, tokenizer=tokenizer, **kwargs)
    module.prepare_data()
    module.setup("fit")
    return module


def letters_of(loader) -> str:
    return "".join(chr(row[0]) for batch in loader for row in batch["input_ids"].tolist())


class Probe(L.LightningModule):
    """Writes down what it is fed."""

    def __init__(self, tokenizer=None):
        super().__init__()
        self.tokenizer = tokenizer
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[str] = []

    def on_train_epoch_start(self):
        self.seen.append("")

    def training_step(self, batch, index):
        self.seen[-1] += "".join(map(chr, batch["input_ids"][:, 0].tolist()))
        return self.weight

    def validation_step(self, batch, index):
        pass

    def test_step(self, batch, index):
        self.seen.append("".join(map(chr, batch["input_ids"][:, 0].tolist())))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(tmp_path, **kwargs) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, **quiet, **kwargs)


def test_training_order_depends_on_seed_and_epoch_alone(char_tokenizer):
    def order(seed, epoch):
        loader = make(char_tokenizer, seed=seed, batch_size=4).train_dataloader()
        loader.sampler.set_epoch(epoch)
        return letters_of(loader)

    orders = [order(seed, epoch) for seed, epoch in [(0, 0), (0, 1), (5, 0)]]
    assert len(set(orders)) == 3
    assert all(sorted(found) == list(LETTERS) for found in orders)
    torch.manual_seed(99)
    assert order(0, 1) == orders[1]


def test_iterating_leaves_the_global_generator_alone(char_tokenizer):
    state = torch.get_rng_state()
    letters_of(make(char_tokenizer).train_dataloader())
    assert torch.equal(torch.get_rng_state(), state)


@ignore_lightning
def test_resume_at_an_epoch_goes_on_with_its_order(char_tokenizer, tmp_path):
    def data():
        return SFTDataModule(texts(), batch_size=4)  # the tokenizer is the module's

    whole, first, second = Probe(char_tokenizer), Probe(char_tokenizer), Probe(char_tokenizer)
    trainer(tmp_path, max_epochs=2, enable_checkpointing=False).fit(whole, datamodule=data())
    short = trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    short.fit(first, datamodule=data())
    short.save_checkpoint(tmp_path / "one.ckpt")
    longer = trainer(tmp_path, max_epochs=2, enable_checkpointing=False)
    longer.fit(second, datamodule=data(), ckpt_path=tmp_path / "one.ckpt")
    assert first.seen + second.seen == whole.seen
    assert whole.seen[0] != whole.seen[1]


@ignore_lightning
def test_module_whose_tokenizer_comes_after_setup(char_tokenizer, tmp_path):
    class Late(Probe):
        def setup(self, stage):
            self.tokenizer = char_tokenizer

    late = Late()
    trainer(tmp_path, enable_checkpointing=False).test(late, datamodule=SFTDataModule(texts(), val_data=texts("xy")))
    assert late.seen == ["xy"]


@ignore_lightning
@pytest.mark.parametrize("kwargs", [{}, {"group_by_length": True}, {"num_workers": 1}])
def test_resume_within_an_epoch_goes_on_with_the_next_batch(char_tokenizer, tmp_path, kwargs):
    data = Dataset.from_dict({"text": [letter * (3 * i % 5 + 1) for i, letter in enumerate(LETTERS[:9])]})
    whole, rest = Probe(char_tokenizer), Probe(char_tokenizer)
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(tmp_path, max_epochs=2, callbacks=[keep]).fit(whole, datamodule=SFTDataModule(data, batch_size=4, **kwargs))
    assert [sorted(letters) for letters in whole.seen] == [list(LETTERS[:9])] * 2
    rest.seen = [""]  # Lightning does not start the epoch a second time
    trainer(tmp_path, max_epochs=2, enable_checkpointing=False).fit(
        rest, datamodule=SFTDataModule(data, batch_size=4, **kwargs), ckpt_path=tmp_path / "step=2.ckpt"
    )
    assert rest.seen == [whole.seen[0][6:], whole.seen[1]]  # 9 rows in 3 batches of 3


class Placed:
    """What a DataModule asks of its trainer."""

    lightning_module = None

    def __init__(self, world_size: int, rank: int) -> None:
        self.world_size, self.global_rank = world_size, rank


def batches_by_process(tokenizer, world_size: int, loader: str, **kwargs) -> list[list[str]]:
    found = []
    for rank in range(world_size):
        module = SFTDataModule(tokenizer=tokenizer, **kwargs)
        module.trainer = Placed(world_size, rank)
        module.setup()
        found.append([letters_of([batch]) for batch in getattr(module, loader)()])
    return found


@pytest.mark.parametrize("group_by_length", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_the_rows(char_tokenizer, world_size, group_by_length):
    options = {"data": texts(), "batch_size": 2, "group_by_length": group_by_length}
    options |= {"val_data": texts("pqrstuv"), "test_data": texts("vwxyz")}
    for name, letters in [("train", LETTERS), ("val", "pqrstuv"), ("test", "vwxyz"), ("predict", "vwxyz")]:
        processes = batches_by_process(char_tokenizer, world_size, f"{name}_dataloader", **options)
        assert len({len(batches) for batches in processes}) == 1
        assert "".join(sorted("".join(map("".join, processes)))) == letters
        if name != "train":
            assert ["".join(batches) for batches in processes] == [letters[r::world_size] for r in range(world_size)]


def test_too_few_rows_for_the_processes(char_tokenizer):
    with pytest.raises(ValueError, match="2 rows cannot be shared out over 3 processes"):
        batches_by_process(char_tokenizer, 3, "val_dataloader", data=texts(), val_data=texts("xy"))


def test_training_rows_of_like_length_share_a_batch(char_tokenizer):
    def padded(**kwargs):
        rows = Dataset.from_dict({"text": [letter * (i % 5 + 1) for i, letter in enumerate(LETTERS * 2)]})
        batches = make(char_tokenizer, rows, batch_size=4, append_eos=False, **kwargs).train_dataloader()
        return sum((batch["attention_mask"] == 0).sum().item() for batch in batches)

    assert padded(group_by_length=True) == 0  # 4 rows of each of 5 lengths
    assert padded() > 0


def test_held_out_rows_come_in_order_of_length(char_tokenizer):
    rows = Dataset.from_dict({"text": ["aaa", "b", "cc", "dddd"]})
    module = make(char_tokenizer, val_data=rows, test_data=rows, group_by_length=True, batch_size=2)
    assert letters_of(module.val_dataloader()) == letters_of(module.test_dataloader()) == "bcad"
    assert letters_of(module.predict_dataloader()) == "abcd"


def test_no_tokenizer():
    module = SFTDataModule(texts())
    module.setup()
    with pytest.raises(ValueError, match="there is no tokenizer: give `tokenizer`"):
        module.train_dataloader()


def test_tokenizer_by_name(char_tokenizer, tmp_path):
    char_tokenizer.save_pretrained(tmp_path)
    assert letters_of(make(str(tmp_path)).train_dataloader())


def test_splits_of_the_source(char_tokenizer):
    named = DatasetDict(train=texts("ab"), val=texts("cd"), test=texts("ef"))
    module = make(char_tokenizer, named, val_share=0.5)  # there is a validation split: val_share does nothing
    assert sorted(letters_of(module.train_dataloader())) == ["a", "b"]
    assert letters_of(module.val_dataloader()) == "cd"
    assert letters_of(module.test_dataloader()) == letters_of(module.predict_dataloader()) == "ef"


def test_val_data_and_test_data(char_tokenizer):
    other = DatasetDict(train=texts("kl"), validation=texts("mn"))
    module = make(char_tokenizer, val_data=other, test_data=texts("op"))
    assert letters_of(module.val_dataloader()) == "mn"
    assert letters_of(module.test_dataloader()) == "op"


def test_without_held_out_data(char_tokenizer):
    module = make(char_tokenizer)
    assert module.val_dataloader() == []
    for loader in (module.test_dataloader, module.predict_dataloader):
        with pytest.raises(ValueError, match=r"there is no test or validation data: give `test_data`, `val_data` or"):
            loader()


def test_testing_falls_back_to_validation(char_tokenizer):
    assert letters_of(make(char_tokenizer, val_data=texts("xy")).test_dataloader()) == "xy"


@ignore_lightning
def test_lightning_skips_validation_without_data(char_tokenizer, tmp_path):
    trainer(tmp_path, max_epochs=1, enable_checkpointing=False).fit(
        Probe(char_tokenizer), datamodule=SFTDataModule(texts())
    )


def test_val_share_holds_out_by_text(char_tokenizer):
    def sides(letters):
        module = make(char_tokenizer, texts(letters), val_share=0.4, seed=len(letters))
        return set(letters_of(module.train_dataloader())), set(letters_of(module.val_dataloader()))

    train, validation = sides(LETTERS * 2)
    assert train | validation == set(LETTERS)
    assert not train & validation  # a text that stands twice is on one side
    more_train, more_validation = sides(LETTERS[::-1] + "klm")
    assert train <= more_train
    assert validation <= more_validation
    with pytest.raises(ValueError, match=r"`val_share`=0\.001 of 10 rows leaves no validation row"):
        make(char_tokenizer, val_share=0.001)


def test_hold_out_share():
    rows = Dataset.from_dict({"text": [str(i) for i in range(2000)]})
    assert 0.27 < len(hold_out(rows, 0.3, lambda row: row["text"])["validation"]) / 2000 < 0.33
    assert unit_hash("a") == unit_hash("a") != unit_hash("b")


def test_max_rows(char_tokenizer):
    def chosen(**kwargs):
        module = make(char_tokenizer, val_data=texts("klmnop"), **kwargs)
        return "".join(sorted(letters_of(module.train_dataloader()))), letters_of(module.val_dataloader())

    train, validation = chosen(max_rows=4, max_val_rows=2)
    assert (len(train), len(validation)) == (4, 2)
    assert train != LETTERS[:4]
    assert chosen(max_rows=4, max_val_rows=2) == (train, validation)
    assert chosen(max_rows=4, seed=1)[0] != train
    assert chosen(max_rows=99) == (LETTERS, "klmnop")


def test_batch_sizes_and_workers(char_tokenizer):
    module = make(char_tokenizer, val_data=texts(), batch_size=4, val_batch_size=5, num_workers=1)
    assert [len(batch["input_ids"]) for batch in module.train_dataloader()] == [3, 3, 4]
    assert [len(batch["input_ids"]) for batch in module.val_dataloader()] == [5, 5]
    assert module.train_dataloader().num_workers == 1
    assert make(char_tokenizer, batch_size=3).val_batch_size == 3


def test_errors_name_the_row_before_any_shuffle(char_tokenizer, write_jsonl):
    path = write_jsonl({"text": "fine"}, {"text": "fine"}, {"text": " "})
    with pytest.raises(ValueError, match=r"data.jsonl, row 2 \(the first is 0\): text is empty"):
        make(char_tokenizer, path, max_rows=1)
    with pytest.raises(ValueError, match=r"`val_data`, row 0 \(the first is 0\): text must be text, not 3"):
        make(char_tokenizer, val_data=Dataset.from_dict({"text": [3]}))
    with pytest.raises(ValueError, match=r"`data` \(validation\), row 0"):
        make(char_tokenizer, DatasetDict(train=texts(), validation=texts(" ")))


def test_loader_before_setup(char_tokenizer):
    for name in ("train_dataloader", "test_dataloader"):
        with pytest.raises(ValueError, match="call `setup` before"):
            getattr(SFTDataModule(texts(), tokenizer=char_tokenizer), name)()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1, not 0"),
        ({"val_batch_size": 0}, "`val_batch_size` must be at least 1"),
        ({"max_length": 0}, "`max_length` must be at least 1"),
        ({"max_rows": 0}, "`max_rows` must be at least 1"),
        ({"max_val_rows": 0}, "`max_val_rows` must be at least 1"),
        ({"num_workers": -1}, "`num_workers` must be at least 0"),
        ({"val_share": 1.0}, "`val_share` must be at least 0 and less than 1"),
    ],
)
def test_argument_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TextDataModule("x", **kwargs)
