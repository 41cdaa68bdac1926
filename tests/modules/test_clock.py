import pytest

from lightning_rlhf.modules import clock as clock_file
from lightning_rlhf.modules.clock import PhaseClock


@pytest.fixture
def at(monkeypatch):
    """Sets the time."""

    def set_time(seconds):
        monkeypatch.setattr(clock_file.time, "perf_counter", lambda: seconds)

    return set_time


def test_phases_add_up_and_what_follows_the_last_mark_does_not_count(at):
    clock = PhaseClock()
    for second, phase in [(10, "rollout"), (13, "scoring"), (14, "rollout"), (19, "update")]:
        at(second)
        clock.enter(phase)
        assert clock.phase == phase
    at(25)
    clock.mark()
    at(100)
    clock.stop()
    assert clock.phase == ""
    assert dict(clock.seconds) == {"rollout": 8, "scoring": 1, "update": 6}


def test_a_phase_that_was_never_marked_took_no_time(at):
    clock = PhaseClock()
    at(1)
    clock.enter("update")
    at(5)
    clock.stop()
    assert clock.seconds["update"] == 0


def test_restart_forgets(at):
    clock = PhaseClock()
    at(1)
    clock.enter("rollout")
    at(2)
    clock.enter("update")
    clock.restart()
    assert (clock.phase, dict(clock.seconds)) == ("", {})
