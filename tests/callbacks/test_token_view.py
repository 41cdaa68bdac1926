import re

import pytest
import torch
from conftest import EOS
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from lightning_rlhf.callbacks.token_view import TokenView, chosen_rows, colour, render, scale, token_text, visible

SAMPLES = {
    "prompt": ["<b>One</b>", "Two", "Three"],
    "response": ["a b", "<x>", "\n"],
    "reward": [0.5, 2.0, -1.0],
    "ended": [True, False, True],
    "reward/vader": [0.25, 0.5, 0.75],
}
IDS = [[97, 32, 98, EOS], [60, 120, 62, EOS], [10, EOS, EOS, EOS]]
MASK = [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]
KL = [[0.0, 0.5, -0.5, 1.0], [0.1, 0.2, 0.3, 99.0], [-1.0, 0.0, 99.0, 99.0]]


def per_token(**more):
    tensors = {"token_ids": torch.tensor(IDS), "mask": torch.tensor(MASK).bool(), "kl": torch.tensor(KL)}
    return tensors | {"logprob": torch.full((3, 4), -0.125)} | more


def spans(page):
    """(title, style, what is shown) of each token."""
    return re.findall(r'<span class="t" title="([^"]*)" style="([^"]*)">(.*?)</span><wbr>', page, flags=re.DOTALL)


def test_tokens_in_order_with_their_colours_and_numbers(tokenizer):
    page = render(SAMPLES, per_token(), tokenizer, 7, 3)
    shown = spans(page)
    assert [text for *_, text in shown] == [
        "&lt;", "x", "&gt;",  # the best, without its padding
        "<i>⏎</i>\n", "&lt;eos&gt;",  # the worst
        "a", "<i>·</i>", "b", "&lt;eos&gt;",
    ]  # fmt: skip
    assert shown[6][0] == "token 2, id 32\nKL 0.5\nlogprob -0.125"
    # Nine tokens are shown, 98% of nine is all of them: full colour at 1.0. Alpha is 0.65 · |kl| / 1.0, to two digits.
    assert [style for _, style, _ in shown[5:]] == [
        "--kl:rgb(37 99 235/0.00)",
        "--kl:rgb(225 60 40/0.33)",
        "--kl:rgb(37 99 235/0.33)",
        "--kl:rgb(225 60 40/0.65)",
    ]
    assert "<title>Tokens of iteration 7</title>" in page
    assert "<span>-1</span><span>0</span><span>1</span>" in page  # the legend's ends


def test_texts_are_escaped_and_figures_shown(tokenizer):
    page = render(SAMPLES, per_token(), tokenizer, 0, 3)
    assert '<p class="prompt">&lt;b&gt;One&lt;/b&gt;</p>' in page
    assert "<b>One" not in page
    assert "<span>reward <b>2</b></span><span>ended <b>no</b></span><span>reward/vader <b>0.5</b></span>" in page


def test_needs_no_network_and_no_script(tokenizer):
    page = render(SAMPLES, per_token(), tokenizer, 0, 3)
    assert not re.search(r"<script|https?://|url\(|@import", page)


def test_one_button_a_measure_that_was_taken(tokenizer):
    def buttons(**more):
        return re.findall(r'id="by-(\w+)"( checked)?', render(SAMPLES, per_token(**more), tokenizer, 0, 1))

    assert buttons() == [("kl", " checked")]
    more = {name: torch.rand(3, 4) for name in ("value", "advantage", "entropy")}
    assert buttons(**more) == [("kl", " checked"), ("advantage", ""), ("value", ""), ("entropy", "")]


def test_padding_and_what_is_not_shown_change_nothing(tokenizer):
    wide = {name: torch.cat([values, torch.ones_like(values[:, :2])], dim=1) for name, values in per_token().items()}
    wide["mask"][:, 4:] = False
    assert render(SAMPLES, wide, tokenizer, 0, 3) == render(SAMPLES, per_token(), tokenizer, 0, 3)


@pytest.mark.parametrize(
    ("rewards", "count", "rows"),
    [
        ([0.5, 2.0, -1.0, 0.0], 2, {1: "best", 2: "worst", 0: "sample 0"}),
        ([0.5, 2.0, -1.0, 0.0], 0, {1: "best", 2: "worst"}),
        ([1.0], 3, {0: "best"}),
        ([float("nan"), 1.0, 2.0], 1, {2: "best", 1: "worst", 0: "sample 0"}),
        ([float("nan")], 1, {0: "sample 0"}),
    ],
)
def test_chosen_rows(rewards, count, rows):
    assert chosen_rows(rewards, count) == rows


def test_scale():
    assert scale("kl", [0.5, -2.0, float("nan")]) == (0.0, 2.0)
    assert scale("value", [1.0, 3.0, 5.0]) == (3.0, 2.0)
    assert scale("kl", [0.1] * 99 + [50.0]) == (0.0, 0.1)  # one of a hundred does not make the others pale
    assert scale("kl", [0.0] * 99 + [50.0]) == (0.0, 50.0)
    assert scale("kl", [0.0, 0.0]) == scale("kl", []) == (0.0, 1.0)


def test_colour():
    assert colour(4.0, 3.0, 2.0) == "rgb(225 60 40/0.33)"
    assert colour(-9.0, 3.0, 2.0) == "rgb(37 99 235/0.65)"
    assert colour(float("nan"), 0.0, 1.0) == "transparent"


def test_visible():
    assert visible("a <b>\t\r\n") == "a<i>·</i>&lt;b&gt;<i>→</i>\t<i>␍</i><i>⏎</i>\n"


def test_bytes_of_a_character_are_shown_as_bytes():
    # GPT-2's names: 0xE2 is "â", 0x80 is the 94th byte that has no sign of its own: "Ģ"; " the" is "Ġthe".
    vocabulary = {"âĢ": 0, "Ķ": 1, "Ġthe": 2}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    assert [token_text(tokenizer, token) for token in range(3)] == ["⟨e2\u202f80⟩", "⟨94⟩", " the"]


def test_space_that_sentencepiece_hides_is_shown():
    made = Tokenizer(models.WordLevel({"▁the": 0, "<0xE2>": 1}, unk_token="▁the"))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    assert [token_text(tokenizer, token) for token in range(2)] == [" the", "<0xE2>"]


class TestCallback:
    def fit(self, fit, tokenizer, callback, per_token=per_token, **options):
        module, _ = fit([], max_epochs=1)

        class Watched(type(module)):
            def on_train_epoch_start(self):
                super().on_train_epoch_start()
                self.samples, self.per_token, self.tokenizer = SAMPLES, per_token(), tokenizer

        return fit([callback], module=Watched(), **options)

    def test_a_page_every_n_iterations(self, fit, tokenizer, tmp_path):
        self.fit(fit, tokenizer, TokenView(every_n_epochs=2, num_samples=0), max_epochs=3)
        pages = sorted((tmp_path / "tokens").iterdir())
        assert [page.name for page in pages] == ["iteration_0.html", "iteration_2.html"]
        assert pages[1].read_text() == render(SAMPLES, per_token(), tokenizer, 2, 0)
        assert "sample 0" not in pages[1].read_text()

    def test_num_samples(self, fit, tokenizer, tmp_path):
        self.fit(fit, tokenizer, TokenView(num_samples=1), max_epochs=1)
        assert "sample 0" in (tmp_path / "tokens/iteration_0.html").read_text()

    def test_module_without_tokens_is_left_alone(self, fit, tokenizer, tmp_path):
        self.fit(fit, tokenizer, TokenView(), per_token=dict, max_epochs=1)
        fit([TokenView()], max_epochs=1)
        assert not (tmp_path / "tokens").exists()

    def test_a_page_that_cannot_be_written_is_a_warning(self, fit, tokenizer, tmp_path):
        (tmp_path / "tokens").write_text("")
        with pytest.warns(UserWarning, match=r"iteration_0\.html cannot be written"):
            self.fit(fit, tokenizer, TokenView(), max_epochs=1)

    @pytest.mark.parametrize(("name", "value"), [("every_n_epochs", 0), ("num_samples", -1)])
    def test_bad_arguments(self, name, value):
        with pytest.raises(ValueError, match=f"`{name}` must be at least .*, but is {value}"):
            TokenView(**{name: value})
