"""Where an iteration's time goes."""

import time
from collections import defaultdict


class PhaseClock:
    """Seconds spent in each phase since `restart`.

    clock.enter("rollout")
    ...
    clock.enter("update")        # ends the phase before
    ...
    clock.mark()                 # the phase reaches until here at least
    clock.stop()                 # ... and what comes after the last mark does not count
    """

    def __init__(self) -> None:
        self.phase = ""
        """The phase it is in; empty between iterations."""
        self.seconds: dict[str, float] = defaultdict(float)
        self._since = self._marked = 0.0

    def restart(self) -> None:
        """Forget all, and begin anew when a phase is entered."""
        self.phase, self.seconds = "", defaultdict(float)

    def enter(self, phase: str) -> None:
        """End the phase before, begin this one."""
        now = time.perf_counter()
        if self.phase:
            self.seconds[self.phase] += now - self._since
        self.phase, self._since, self._marked = phase, now, now

    def mark(self) -> None:
        """Note that the phase is still under way."""
        self._marked = time.perf_counter()

    def stop(self) -> None:
        """End the phase where it was last marked."""
        if self.phase:
            self.seconds[self.phase] += self._marked - self._since
        self.phase = ""
