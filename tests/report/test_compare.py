import math
import re
from pathlib import Path

import pytest
from run_folders import Page, held_out_rows, rollout_rows, write_csv

from lightning_rlhf.report import main_report, write_comparison
from lightning_rlhf.report.compare import Group, band, config_differences, final_table, grouped, mean_and_sd
from lightning_rlhf.report.run import Run, read_run


def make_run(root, name, reward, kl_coef=None, seed=0, iterations=3):
    folder = root / name
    rows = rollout_rows(iterations, reward)
    rows[-1]["val/reward"] = reward
    write_csv(folder / "metrics.csv", rows)
    write_csv(folder / "validation.csv", held_out_rows(0, [0.0]) + held_out_rows(iterations, [reward]))
    if kl_coef is not None:
        model = f"model:\n  init_args:\n    kl_coef: {kl_coef}\n"
        (folder / "config.yaml").write_text(f"seed_everything: {seed}\ntrainer:\n  default_root_dir: {name}\n{model}")
    return folder


def small_run(root, name):
    write_csv(root / name / "metrics.csv", [{"epoch": 0, "step": 0, "train/loss": 1.0}])
    return root / name


def run(name, config=""):
    return Run(Path("runs") / name, config=config)


def labels(*runs):
    return {group.label: [each.name for each in group.runs] for group in grouped(list(runs))}


class TestGroups:
    def test_names_without_their_seed(self):
        names = ["ppo-1", "ppo-2", "ppo_seed3", "ppo-s4", "grpo-1", "ppo", "gpt2"]
        found = labels(*map(run, names))
        assert found == {"ppo": ["ppo-1", "ppo-2", "ppo_seed3", "ppo-s4", "ppo"], "grpo": ["grpo-1"], "gpt2": ["gpt2"]}

    def test_equal_configs_but_for_seed_and_folder(self):
        configs = [f"seed_everything: {n}\ntrainer: {{default_root_dir: runs/{n}}}\nlr: 1" for n in (1, 2)]
        assert labels(run("first", configs[0]), run("second", configs[1])) == {"first": ["first", "second"]}

    def test_equal_names_with_other_settings_are_two_groups(self):
        assert labels(run("lr-1", "lr: 1"), run("lr-2", "lr: 2")) == {"lr-1": ["lr-1"], "lr-2": ["lr-2"]}

    def test_models_of_the_same_seed_do_not_part_runs(self):
        configs = [f"model: runs/sft-{n}/model\nlr: 1" for n in (1, 2)]
        assert labels(run("ppo-1", configs[0]), run("ppo-2", configs[1])) == {"ppo": ["ppo-1", "ppo-2"]}
        other = "model: runs/sft-9/model\nlr: 1"
        assert len(labels(run("ppo-1", configs[0]), run("ppo-2", other))) == 2

    def test_run_without_config_joins_its_name(self):
        assert labels(run("ppo-1", "lr: 1"), run("ppo-2")) == {"ppo": ["ppo-1", "ppo-2"]}

    def test_broken_config_is_as_none(self):
        assert labels(run("ppo-1", "a: [1"), run("ppo-2", "a: {")) == {"ppo": ["ppo-1", "ppo-2"]}


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([1.0, 2.0, 6.0], "3 ± 2.65"),  # (4 + 1 + 9) / 2 = 7, root 2.6458
        ([2.0], "2"),
        ([], "–"),
        ([1.0, math.nan], "NaN"),
    ],
)
def test_mean_and_standard_deviation(values, text):
    assert mean_and_sd(values) == text


def test_final_table(tmp_path):
    runs = [read_run(make_run(tmp_path, f"ppo-{n}", reward)) for n, reward in ((1, 1.0), (2, 2.0), (3, 6.0))]
    write_csv(tmp_path / "sft" / "metrics.csv", [{"step": 0, "val/loss": 2.5}])
    table = final_table([Group("ppo", runs), Group("sft", [read_run(tmp_path / "sft")])])
    cells = {label: dict(zip(table.names, values, strict=True)) for label, _, values in table.rows}
    assert [row[:2] for row in table.rows] == [("ppo", 3), ("sft", 1)]
    assert cells["ppo"]["reward"] == "3 ± 2.65"
    assert cells["ppo"]["KL, nats"] == "3 ± 0"
    assert cells["ppo"]["time"] == "15 s ± 0 s"  # three iterations of 5 s
    assert cells["ppo"]["held-out loss"] == cells["sft"]["reward"] == "–"
    assert cells["sft"]["held-out loss"] == "2.5"


def test_band_goes_from_smallest_to_largest(tmp_path):
    # At iteration e: e, 2 e and 6 e.
    runs = [read_run(make_run(tmp_path, f"ppo-{n}", reward)) for n, reward in ((1, 1.0), (2, 2.0), (3, 6.0))]
    line = band(Group("ppo", runs), "rollout/reward")
    assert (line.x, line.y) == ([0.0, 1.0, 2.0], [0.0, 3.0, 6.0])
    assert (line.low, line.high) == ([0.0, 1.0, 2.0], [0.0, 6.0, 12.0])
    alone = band(Group("ppo", runs[:1]), "rollout/reward")
    assert (alone.low, alone.high) == (None, None)
    assert band(Group("ppo", runs), "val/loss") is None


def test_mean_ends_where_half_of_the_runs_have_ended(tmp_path):
    runs = [read_run(make_run(tmp_path, f"ppo-{n}", 1.0, iterations=n)) for n in (2, 3, 5)]
    assert band(Group("ppo", runs), "rollout/kl").x == [0.0, 1.0, 2.0]  # at 2 there are two of three


def test_config_differences():
    def group(label, config):
        return Group(label, [run(label, config)])

    first = "seed_everything: 1\nmodel: {kl_coef: 0.1, lr: 1}\ntrainer: {callbacks: [{a: 1}, {b: 2}]}"
    second = "seed_everything: 2\nmodel: {kl_coef: 0.2, lr: 1, group_size: 8}\ntrainer: {callbacks: [{a: 1}, {b: 3}]}"
    assert config_differences([group("x", first), group("y", second), group("z", "")]) == [
        ("model.kl_coef", ["0.1", "0.2", "–"]),
        ("trainer.callbacks.1.b", ["2", "3", "–"]),
        ("model.group_size", ["–", "8", "–"]),
    ]
    assert config_differences([group("x", first), group("y", first)]) == []


class TestPage:
    def test_comparison_of_two_groups(self, tmp_path):
        folders = [make_run(tmp_path, f"ppo-{n}", float(n), 0.1, n) for n in (1, 2, 3)]
        folders += [make_run(tmp_path, f"grpo-{n}", 1.0, 0.2, n) for n in (1, 2)]
        text = write_comparison(folders, tmp_path / "comparison.html").read_text()
        page = Page(text)
        assert any(each.startswith("5 runs in 2 groups.") for each in page.texts)
        assert page.texts[page.texts.index("ppo", page.texts.index("Final figures")) :][:3] == ["ppo", "3", "2 ± 1"]
        assert {"Reward against KL", "Reward, rollouts", "Reward, held-out", "model.init_args.kl_coef"} <= set(
            page.texts
        )
        assert not re.search(r"https?://|@import", text)
        assert len(page.values("id")) == len(set(page.values("id")))

    def test_links_to_reports_that_exist(self, tmp_path):
        folders = [make_run(tmp_path, name, 1.0) for name in ("a b-1", "a b-2")]
        (folders[0] / "report.html").write_text("")
        page = Page(write_comparison(folders, tmp_path / "out" / "comparison.html").read_text())
        assert page.links() == ["data:,", "../a%20b-1/report.html"]

    def test_no_run(self, tmp_path):
        with pytest.raises(ValueError, match="`folders` must name at least one run"):
            write_comparison([], tmp_path / "x.html")


class TestCommand:
    def test_one_run(self, tmp_path, capsys):
        folder = small_run(tmp_path, "ppo-1")
        assert main_report([str(folder)]) == folder / "report.html"
        assert capsys.readouterr().out == f"Report: {folder / 'report.html'}\n"

    def test_one_run_elsewhere(self, tmp_path):
        folder = small_run(tmp_path, "ppo-1")
        path = main_report([str(folder)], str(tmp_path / "there" / "page.html"))
        assert path.resolve() == (tmp_path / "there" / "page.html").resolve()
        assert "ppo-1" in path.read_text()

    def test_several_runs(self, tmp_path):
        folders = [small_run(tmp_path, f"ppo-{n}") for n in (1, 2)]
        assert main_report(list(map(str, folders))) == tmp_path / "comparison.html"
        assert all((folder / "report.html").exists() for folder in folders)

    def test_folder_of_runs(self, tmp_path):
        small_run(tmp_path, "ppo-1")
        (tmp_path / "data").mkdir()  # not a run
        assert main_report([str(tmp_path)], str(tmp_path / "all.html")) == tmp_path / "all.html"
        assert "ppo-1" in (tmp_path / "all.html").read_text()

    def test_no_run(self, tmp_path):
        with pytest.raises(ValueError, match=r"`folders` must be runs or hold runs, but .* is none and holds none"):
            main_report([str(tmp_path)])
