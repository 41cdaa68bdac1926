import sys

from lightning_rlhf.callbacks import ProgressBar
from lightning_rlhf.callbacks.progress import short_figures


def test_one_plain_line_per_epoch_where_output_is_no_terminal(fit, capsys):
    fit([ProgressBar()], enable_progress_bar=True)
    assert capsys.readouterr().out.splitlines() == [
        "epoch 0: reward 0.5, kl 0, clip 0.25",
        "epoch 1: reward 1.5, kl 2, clip 0.25",
    ]


def test_bar_in_a_terminal(fit, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    fit([ProgressBar()], max_epochs=1, enable_progress_bar=True)
    printed = capsys.readouterr().out
    assert "reward=0.5, kl=0, clip=0.25" in printed
    assert "v_num" not in printed


def test_figures_by_method():
    assert short_figures({"train/loss": 2.0, "val/perplexity": 123.4}) == {"loss": "2", "val ppl": "123"}
    assert short_figures({"train/loss": 0.65, "val/agreement": 0.7}) == {"loss": "0.65", "agreement": "0.7"}
    ppo = {"rollout/reward": 0.5, "train/loss": 2.0, "throughput/tokens_per_second": 1234.5}
    assert short_figures(ppo) == {"reward": "0.5", "tok/s": "1234"}
