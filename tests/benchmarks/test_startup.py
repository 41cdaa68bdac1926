"""What the benchmark of the start reads: another process's time, and when a training's first batch begins."""

import json
import sys
import time

import pytest
from startup import FirstBatch, seconds


def test_a_process_that_fails_is_shown(tmp_path):
    with pytest.raises(SystemExit, match=r"(?s)failed with code 3:.*it says why"):
        seconds([sys.executable, "-c", "import sys; print('it says why', file=sys.stderr); sys.exit(3)"], tmp_path)


def test_seconds_are_of_the_process_that_was_run(tmp_path):
    work = "import time\nwhile time.process_time() < 0.3: pass\nprint(time.process_time(), file=open('own', 'w'))"
    took = seconds([sys.executable, "-c", work], tmp_path)
    assert took.cpu >= float((tmp_path / "own").read_text()) >= 0.3
    waited = seconds([sys.executable, "-c", "import time; time.sleep(0.3)"], tmp_path)
    assert waited.clock >= 0.3


def test_only_the_first_batch_counts(tmp_path):
    callback = FirstBatch(str(tmp_path / "noted.json"))
    before = time.time(), time.process_time()
    callback.on_train_batch_start(None, None, None, 0)
    noted = json.loads((tmp_path / "noted.json").read_text())
    assert before <= tuple(noted)
    callback.on_train_batch_start(None, None, None, 1)
    assert json.loads((tmp_path / "noted.json").read_text()) == noted
