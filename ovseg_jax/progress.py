"""What a program says while it works, on stderr, and the tables that it prints at the end."""

import sys
import time


class Progress:
    """A line that is rewritten on a terminal, and repeated now and then in a file.

    Args:
      quiet: say nothing (processes other than the first).
      every: seconds between lines where the output is no terminal.
    """

    def __init__(self, quiet: bool = False, every: float = 15.0):
        self._quiet, self._every = quiet, every
        self._terminal = sys.stderr.isatty()
        self._open = False
        self._last = float("-inf")
        self._started: dict[str, float] = {}

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self._quiet:
            self._end_line()
            print(text, file=sys.stderr, flush=True)

    def update(self, text: str, *, final: bool = False) -> None:
        """The line that is replaced by the next one."""
        now = time.monotonic()
        if self._quiet or (not self._terminal and not final and now - self._last < self._every):
            return
        self._last = now
        if self._terminal:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
            self._open = True
            if final:
                self._end_line()
        else:
            print(text, file=sys.stderr, flush=True)

    def count(self, label: str, done: int, total: int) -> None:
        """Progress of a job with a known end: share, rate, time left."""
        rated = label in self._started and done > 0
        start = self._started.setdefault(label, time.monotonic())
        spent = max(time.monotonic() - start, 1e-6)
        left = spent / max(done, 1) * (total - done)
        rate = f"{done / spent:.{0 if done > 10 * spent else 2}f}/s"
        speed = f" ({rate}, {duration(left)} left)" if rated else ""
        self.update(f"{label}: {done}/{total}{speed}", final=done == total)

    def _end_line(self) -> None:
        if self._open:
            print(file=sys.stderr)
            self._open = False


def duration(seconds: float) -> str:
    """1:05 for 65 seconds, 1:00:05 for an hour more."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def table(rows: list[tuple[str, ...]]) -> str:
    """Columns aligned, the first row a head with a rule below."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
