import json
import re
import subprocess
import sys

import pytest
from run_folders import HOSTILE, Page, held_out_rows, rollout_rows, write_csv

from lightning_rlhf.report import outcome, write_report


def read(folder):
    text = write_report(folder).read_text()
    return text, Page(text)


def test_page_of_a_whole_run(folder):
    (folder / "goals.json").write_text(json.dumps({"min_reward_gain": 1.0, "max_kl": 2.5}))
    _, page = read(folder)
    shown = page.texts
    for expected in (
        "ppo-1",
        "1 of 2 goals met",
        "1 alarm raised",
        "finished",
        "1 of 2 goals missed: mean sequence KL (nats).",
    ):
        assert expected in shown
    assert "3 held-out prompts, before training and after 3 iterations; paired differences with 95% intervals." in shown
    assert shown[shown.index("Reward") : shown.index("Reward") + 3] == ["Reward", "2 →", "4"]
    assert "words 0 2" in shown  # a held-out response before
    assert "words 3 2" in shown  # and after
    assert {"KLAlarm", "git.commit", "abc123", "config.yaml"} <= set(shown)
    assert "What is not here" not in shown
    assert page.links() == ["data:,", "tokens/iteration_2.html", "tokens/iteration_10.html"]


def test_parts_are_in_order(folder):
    text, _ = read(folder)
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings == [
        "Key figures",
        "Curves",
        "Reward, KL and length",
        "Samples",
        "Time and memory",
        "Alarms",
        "The run",
    ]


def test_page_asks_for_nothing_outside_itself(folder):
    text, page = read(folder)
    wanted = [*page.values("src"), *page.values("href"), *re.findall(r"url\(([^)]*)\)", text)]
    assert wanted
    assert not [each for each in wanted if re.match(r"\s*['\"]?(\w+:)?//", each)]
    assert not re.search(r"@import|https?://", text)
    assert "default-src 'none'" in text  # and a browser would not let it


def test_texts_cannot_become_markup(folder):
    rows = held_out_rows(0, [1.0]) + held_out_rows(1, [2.0])
    write_csv(folder / "validation.csv", [row | {"prompt": HOSTILE, "response": HOSTILE} for row in rows])
    columns = {f"rollout/reward/{HOSTILE}": 1.0, HOSTILE: 2.0}
    write_csv(folder / "metrics.csv", [row | columns for row in rollout_rows()])
    (folder / "config.yaml").write_text(HOSTILE)
    (folder / "run.json").write_text(json.dumps({HOSTILE: HOSTILE, "status": HOSTILE}))
    text, page = read(folder)
    assert text.count("<script") == 1
    assert page.texts.count(HOSTILE) >= 6  # prompts, responses, the alarm, config and provenance show it as it is


def test_ids_of_all_charts_differ(folder):
    _, page = read(folder)
    ids = page.values("id")
    assert ids
    assert len(ids) == len(set(ids))


def test_same_files_same_page(folder):
    assert read(folder)[0] == read(folder)[0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("metrics.csv", "No curves: metrics.csv is missing."),
        ("validation.csv", "No held-out responses: validation.csv is missing."),
        ("config.yaml", "No config: config.yaml is missing."),
        ("run.json", "No provenance: run.json is missing."),
    ],
)
def test_missing_file_is_named(folder, name, said):
    assert said not in read(folder)[0]
    (folder / name).unlink()
    assert said in read(folder)[0]


@pytest.mark.parametrize(
    "name", ["metrics.csv", "validation.csv", "samples.csv", "run.json", "alarms.jsonl", "summary.json"]
)
def test_any_single_file_makes_a_page(folder, tmp_path, name):
    alone = tmp_path / "alone"
    alone.mkdir()
    (folder / name).rename(alone / name)
    assert "alone" in read(alone)[1].texts


def test_alarms_are_counted(folder):
    assert "1 alarm raised" in read(folder)[0]
    (folder / "alarms.jsonl").unlink()
    assert "no alarm raised" in read(folder)[0]


def test_run_that_was_killed(folder):
    (folder / "run.json").write_text(json.dumps({"status": "running"}))
    with (folder / "metrics.csv").open("a") as file:
        file.write("3,7,0.12")
    with (folder / "validation.csv").open("a") as file:
        file.write('5,9,prompt,"a response that')
    _, page = read(folder)
    assert "not finished" in page.texts
    assert "15 s" in page.texts  # three iterations of 5 s


def test_only_one_evaluation(folder):
    write_csv(folder / "validation.csv", held_out_rows(3, [1.0, 2.0]))
    text, page = read(folder)
    assert "No comparison of before and after: there is only one evaluation." in text
    assert "2 held-out prompts, after 3 iterations." in page.texts


def test_baseline_of_some_of_the_prompts(folder):
    write_csv(folder / "validation.csv", held_out_rows(0, [1.0]) + held_out_rows(3, [2.0, 9.0]))
    _, page = read(folder)
    assert any(text.startswith("The first 1 of 2 held-out prompts, before training") for text in page.texts)
    assert page.texts[page.texts.index("Reward") + 1 :][:2] == ["1 →", "2"]


def test_baseline_of_other_prompts(folder):
    other = [row | {"prompt": "another"} for row in held_out_rows(0, [1.0])]
    write_csv(folder / "validation.csv", other + held_out_rows(3, [2.0]))
    assert "The first evaluation had other prompts: nothing can be compared." in read(folder)[0]


def test_nan_everywhere(folder):
    nan = float("nan")
    rows = [{name: nan if "/" in name else value for name, value in row.items()} for row in rollout_rows()]
    write_csv(folder / "metrics.csv", rows)
    write_csv(folder / "validation.csv", held_out_rows(0, [nan, nan]) + held_out_rows(3, [nan, nan]))
    (folder / "goals.json").write_text(json.dumps({"min_reward_gain": 1.0, "max_kl": 2.5}))
    _, page = read(folder)
    assert "NaN" in page.texts


def test_outcome(folder):
    assert outcome(folder) == "1 alarm raised."
    (folder / "goals.json").write_text(json.dumps({"max_kl": 10.0}))
    assert outcome(folder) == "The goal holds: mean sequence KL (nats). 1 alarm raised."
    (folder / "validation.csv").unlink()
    assert outcome(folder) == "No goals could be judged: there are no held-out responses. 1 alarm raised."


def test_a_report_is_quick_to_import():
    code = "import sys, lightning_rlhf.report; print({'torch', 'lightning', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
