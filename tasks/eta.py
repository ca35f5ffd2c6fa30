"""Time that a stage still needs, from the moments at which it told its steps.

Typical steps and pauses (saves, evaluations) are counted apart, so that a pause that has just been
made does not make all later steps look slow. The first step is left out as soon as others are
known: it loads, compiles and warms up. Steps of an earlier try took none of this try's time.
"""

from __future__ import annotations

from statistics import fmean, median

#: A step that took this many times the median is a pause beside a step.
PAUSE = 3.0
#: Steps that the typical one is the mean of: at least these, and this share of those seen.
RECENT, SHARE = 16, 0.5


class Eta:
    """Estimates the seconds that are left of one try of a stage.

    Times are seconds of any clock that does not jump.
    """

    def __init__(self, started: float) -> None:
        self._started = started
        self._last: tuple[int, float] | None = None
        self._first: tuple[int, float] | None = None
        self._total = 0
        self._steps: list[tuple[int, float]] = []
        """Steps between two moments that were told, and the seconds of one of them."""

    def tell(self, step: int, total: int, now: float) -> None:
        """Note that `step` of `total` is done; the same step again changes nothing."""
        self._total = total
        if self._last is None:
            self._first = (step, now - self._started)
        elif step > self._last[0]:
            count = step - self._last[0]
            self._steps.append((count, (now - self._last[1]) / count))
        else:
            return
        self._last = (step, now)

    def left(self, now: float) -> float | None:
        """Return the seconds that are left, or None while nothing is known of a step's time."""
        if self._last is None or self._first is None:
            return None
        step, since = self._last
        if step >= self._total:
            return 0.0
        if self._steps:
            seconds = self._seconds_per_step()
        elif self._first[0] == 1:  # later, it is not known how many steps this try has made
            seconds = self._first[1]
        else:
            return None
        # The step that is being made may take longer than the typical one; the others do not less.
        rest = (self._total - step - 1) * seconds
        return rest + max(seconds - (now - since), 0.0)

    def _seconds_per_step(self) -> float:
        """Return a typical recent step's seconds, and its share of all pauses so far."""
        seen = self._steps
        if len(seen) > 2 and seen[0][1] > PAUSE * median(s for _, s in seen):
            seen = seen[1:]  # a second slow step, as where kernels are compiled for the optimiser
        usual = median(seconds for _, seconds in seen)
        steps = [min(seconds, usual) if seconds > PAUSE * usual else seconds for _, seconds in seen]
        recent = steps[-max(RECENT, int(SHARE * len(steps))) :]
        paused = sum(c * (s - u) for (c, s), u in zip(seen, steps, strict=True))
        return fmean(recent) + paused / sum(count for count, _ in seen)
