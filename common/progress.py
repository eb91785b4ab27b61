"""What a run says of its length."""

import math
import time

from common.flags import RunConfig
from common.layouts import Data


def plan(cfg: RunConfig, data: Data, total: int, processes: int, begin: int) -> str:
    """How many steps there are, of how many pictures, and what epochs they amount to.

    begin: the step with which unlabelled pictures come in.
    """
    factors = (cfg.batch_size, "batch"), (cfg.accum, "accum"), (processes, "processes")
    several = [f"{count} {name}" for count, name in factors if count > 1]
    count = math.prod(number for number, _ in factors)
    how = f" ({' x '.join(several)})" * (len(several) > 1)
    sizes, passes = f"{count}", f"{short(total * count / len(data.labeled))} epochs"
    if not getattr(cfg, "supervised_only", True):
        sizes = f"{count} labelled and {count} unlabelled"
        others = short((total - begin) * count / len(data.unlabeled))
        passes += f" of the labelled, {others} of the unlabelled"
    return f"{total} steps of {sizes} pictures{how}: {passes}"


def short(number: float) -> str:
    """Three digits, or all before the point."""
    return f"{number:.3g}" if number < 999 else f"{number:.0f}"


class Clock:
    """Tells what the steps left will take, by five steps after the first three, which take longer.

    starts: the steps from which a step is as long as those to come.
    """

    def __init__(self, starts: set[int], stop: int):
        self.starts, self.stop, self.since = starts, stop, 0.0

    def looks(self, step: int) -> bool:
        """Whether it looks before this step: then the device has to be through with the last."""
        return bool({step - 3, step - 8} & self.starts)

    def look(self, step: int) -> str:
        """The time left, where it is known by now and worth a line; else ""."""
        before, self.since = self.since, time.time()
        seconds = (self.since - before) / 5 * (self.stop - step)
        if step - 8 not in self.starts or seconds < 20:
            return ""
        return f"about {duration(seconds)} to step {self.stop}, without evaluations"


def duration(seconds: float) -> str:
    """In the unit that suits it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
