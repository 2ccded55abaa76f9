"""What a program says while it works, on stderr, and the tables that it prints at the end."""

import sys
import time

# Seconds between the lines of a job where the output is no terminal.
EVERY = 15.0


class Progress:
    """A line that is rewritten on a terminal, and repeated now and then in a file; with `quiet`
    (processes other than the first) nothing is said."""

    def __init__(self, quiet: bool = False):
        self._quiet = quiet
        self._terminal = sys.stderr.isatty()
        self._open = False
        self._last = float("-inf")
        self._started: dict[str, float] = {}

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self._quiet:
            print(f"\n{text}" if self._open else text, file=sys.stderr, flush=True)
            self._open = False

    def update(self, text: str, *, final: bool = False) -> None:
        """The line that is replaced by the next one."""
        now = time.monotonic()
        if self._quiet or (not self._terminal and not final and now - self._last < EVERY):
            return
        self._last = now
        if not self._terminal:
            self.say(text)
            return
        print(f"\r\x1b[K{text}", end="\n" if final else "", file=sys.stderr, flush=True)
        self._open = not final

    def count(self, label: str, done: int, total: int) -> None:
        """Progress of a job with a known end: share, rate, time left."""
        rated = label in self._started and done > 0
        start = self._started.setdefault(label, time.monotonic())
        spent = max(time.monotonic() - start, 1e-6)
        left = spent / max(done, 1) * (total - done)
        rate = f"{done / spent:.{0 if done > 10 * spent else 2}f}/s"
        speed = f" ({rate}, {duration(left)} left)" if rated else ""
        self.update(f"{label}: {done}/{total}{speed}", final=done == total)


def duration(seconds: float) -> str:
    """1:05 for 65 seconds, 1:00:05 for an hour more."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def table(rows: list[tuple[str, ...]]) -> str:
    """Columns aligned, the first row a head with a rule below."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *cells in [rows[0], tuple("-" * width for width in widths), *rows[1:]]:
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *right]))
    return "\n".join(lines)
