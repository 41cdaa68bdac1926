"""Growth: slopes of known laws, the x axis of the model sweep, and one point measured."""

import math

import growth
import pytest
from growth import SWEEPS, TINY, measure, report, slopes
from small_llama import llama_config
from transformers import LlamaModel


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_slope_of_a_power_law_is_its_power(power):
    x = [2.0, 4.0, 16.0]
    assert slopes(x, [3 * value**power for value in x]) == pytest.approx((power, power))


def test_the_last_slope_leaves_a_fixed_part_behind():
    whole, last = slopes([1.0, 10.0, 100.0], [11.0, 20.0, 110.0])  # 10 + x
    assert last == pytest.approx(math.log10(110 / 20))
    assert whole == pytest.approx(math.log10(110 / 11) / 2)  # of three equidistant points the middle one has no say


def test_weights_of_the_blocks_are_counted_right():
    for count, run in SWEEPS["weights of the blocks"].items():
        blocks = LlamaModel(llama_config(run.shape)).layers
        assert count == sum(p.numel() for p in blocks.parameters() if p.dim() == 2)


def test_a_sweep_changes_nothing_but_what_it_is_of():
    for run in SWEEPS["vocabulary"].values():
        assert run.batch * run.response == growth.BASE.batch * growth.BASE.response
    for run in SWEEPS["response tokens"].values():
        assert (run.shape, run.batch) == (growth.SMALL, 4)
    for rows, run in SWEEPS["rows of a minibatch"].items():
        assert (run.batch, run.rollout_batch_size, run.response) == (rows, 4 * rows, growth.BASE.response)


def test_a_point_is_measured():
    found = measure(TINY, 3)
    assert found["seconds"] > 0
    assert found["mib"] > 0
    assert len(found["resident"]) == 3


def test_the_report_names_points_slopes_and_the_longer_run(tmp_path):
    points = {str(x): {"seconds": 0.5 * x, "mib": 100.0} for x in (1, 2, 4)}
    longer = {"resident": [float(i) for i in range(1, 21)]}
    text = "\n".join(report({"rows": points}, longer))
    assert "| rows | 1, 2, 4 | 0.50, 1.00, 2.00 s | 1.00 | 1.00 |" in text
    assert "| rows | 1, 2, 4 | 100, 100, 100 MiB | 0.00 | 0.00 |" in text
    assert "2 MiB resident after a tenth of 20 iterations, 20 after" in text
    growth.draw({"rows": points}, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 5000
