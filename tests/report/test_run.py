import math

import pytest
from run_folders import held_out_rows, rollout_rows, write_csv

from lightning_rlhf.report.run import merged, number, read_run, rows_of


def test_everything_is_read(folder):
    run = read_run(folder)
    assert run.name == "ppo-1"
    assert run.series("rollout/reward") == ([0.0, 1.0, 2.0], [0.0, 1.0, 2.0])
    assert run.first_and_last("rollout/kl") == (0.0, 4.0)
    assert run.before["reward"] == [0.0, 2.0, 4.0]
    assert run.after["response"] == ["words 3 0", "words 3 1", "words 3 2"]
    assert run.after["ended"] == [1.0, 1.0, 1.0]
    assert run.alarms[0]["alarm"] == "KLAlarm"
    assert run.token_views == ["tokens/iteration_2.html", "tokens/iteration_10.html"]  # 2 before 10


def test_axis_of_on_policy_runs_is_finished_iterations(folder):
    run = read_run(folder)
    # Two optimizer steps within each iteration.
    assert run.series("policy/grad_norm")[0] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    write_csv(folder / "metrics.csv", [{"epoch": 4, "step": 9, "rollout/kl": 1.0, "val/kl": 2.0}])
    run = read_run(folder)
    assert run.series("rollout/kl")[0] == [4.0]  # of the policy that 4 iterations made
    assert run.series("val/kl")[0] == [5.0]  # validation came after the fifth


def test_axis_of_other_runs_is_optimizer_steps(tmp_path):
    write_csv(tmp_path / "metrics.csv", [{"epoch": 0, "step": 9, "train/loss": 2.0}, {"epoch": 0, "step": 19}])
    assert read_run(tmp_path).series("train/loss") == ([10.0], [2.0])


def test_rows_of_one_step_are_one_row():
    rows = [{"epoch": 1.0, "step": 5.0, "a": 1.0}, {"epoch": 1.0, "step": 5.0, "b": 2.0}]
    assert merged([rows]) == [{"epoch": 1.0, "step": 5.0, "a": 1.0, "b": 2.0}]


def test_iteration_repeated_after_a_resume_counts_once_the_later(tmp_path):
    # The first process did iterations 0 to 2, was killed, and the second went on after iteration 0.
    write_csv(tmp_path / "metrics_0.csv", rollout_rows(3))
    write_csv(tmp_path / "metrics_1.csv", [row for row in rollout_rows(2, reward=10.0) if row["epoch"] >= 1])
    write_csv(tmp_path / "metrics.csv", [row for row in rollout_rows(4, reward=100.0) if row["epoch"] >= 2])
    assert read_run(tmp_path).series("rollout/reward") == ([0.0, 1.0, 2.0, 3.0], [0.0, 10.0, 200.0, 300.0])


def test_parts_are_in_the_order_of_their_numbers(tmp_path):
    for n in (2, 10):  # as text, 10 comes before 2
        write_csv(tmp_path / f"metrics_{n}.csv", [{"epoch": 0, "step": 1, "train/loss": float(n)}])
    write_csv(tmp_path / "metrics_old.csv", [{"epoch": 0, "step": 0, "train/loss": -1.0}])  # not a part
    write_csv(tmp_path / "metrics.csv", [{"epoch": 0, "step": 3, "train/loss": 5.0}])
    assert read_run(tmp_path).series("train/loss") == ([2.0, 4.0], [10.0, 5.0])


@pytest.mark.parametrize("cut", ['0,1,"half', "0,1", "0,1,2.3", '0,1,"two\nlines'])
def test_row_that_was_cut_off_is_left_out(tmp_path, cut):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,train/loss\n0,0,1.5\n" + cut)
    assert rows_of(path) == [{"epoch": "0", "step": "0", "train/loss": "1.5"}]


def test_what_is_not_csv_costs_only_itself(tmp_path):
    path = tmp_path / "validation.csv"
    path.write_bytes(b'iteration,step,prompt,response,reward\n0,0,p,\xff\0r,1.0\n1,2,p,"' + b"x" * 200_000 + b"\n")
    run = read_run(tmp_path)
    assert run.evaluations[0]["response"] == ["\ufffdr"]
    assert list(run.evaluations) == [0]


def test_broken_json_is_as_if_it_were_not_there(folder):
    (folder / "run.json").write_text('{"seconds": ')
    (folder / "summary.json").write_text("[1]")
    (folder / "alarms.jsonl").write_text('{"alarm": "A"}\n[]\n{"alarm": "B"}\n{"ala')
    run = read_run(folder)
    assert run.provenance == run.summary == {}
    assert [alarm["alarm"] for alarm in run.alarms] == ["A", "B"]


def test_nan_is_a_number_and_an_empty_field_is_none():
    assert math.isnan(number("nan"))
    assert number("") is None
    assert number(None) is None
    assert (number("True"), number("False"), number("-inf")) == (1.0, 0.0, -math.inf)


def test_columns_that_an_evaluation_lacks_are_left_out(tmp_path):
    rows = held_out_rows(0, [1.0]) + held_out_rows(1, [1.0], reference_reward=[2.0])
    write_csv(tmp_path / "validation.csv", rows)
    run = read_run(tmp_path)
    assert "reference_reward" not in run.before
    assert run.after["reference_reward"] == [2.0]


def test_evaluations_within_an_iteration_are_spread_over_it(tmp_path):
    before, within = held_out_rows(0, [1.0]), held_out_rows(0, [2.0])
    write_csv(tmp_path / "validation.csv", before + [row | {"step": 3} for row in within] + held_out_rows(1, [3.0]))
    run = read_run(tmp_path)
    assert {place: columns["reward"] for place, columns in run.evaluations.items()} == {0: [1.0], 0.5: [2.0], 1: [3.0]}


def test_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`folder` must hold a run's files \(metrics.csv, .* has none of them"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match=r"`folder` must be the folder of a run, but .*missing is not a folder"):
        read_run(tmp_path / "missing")
