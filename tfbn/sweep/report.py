"""Print the progress of a sweep, in words or as a bar."""

import math
import time

import keras


class Report:
    """A Keras progress bar over all levels of a sweep.

    Args:
        method: The name of the method.
        verbose: 0 for silence, 1 for a progress bar, 2 for one line with the time. `"auto"` is 1.
        total: Number of batches, `None` if unknown.
        unit: The word for a batch.
    """

    def __init__(self, method: str, verbose: int | str, total: int | None, unit: str = "batch"):
        self._unit = unit
        self._method = method
        self._verbose = 1 if verbose == "auto" else int(verbose)
        self._total = total
        self._bar: keras.utils.Progbar | None = None
        self._seen = 0
        self._level = 0
        self._began = 0.0

    def begin(self) -> None:
        """Print that the sweep begins, before the network is traced."""
        self._began = time.perf_counter()
        if self._verbose == 1:
            print(f"Population statistics, {self._method}")

    def begin_level(self, level: int) -> None:
        """Begin a level."""
        self._level = level
        self._seen = 0

    def begin_round(self, batches: int, samples: int) -> None:
        """Print the size of the sample."""
        if self._verbose == 1:
            print(f"{samples} samples in {batches} batches: ", end="", flush=True)

    def end_round(self, error: float, tolerance: float) -> None:
        """Print the error of the statistics of a sample."""
        if self._verbose == 1:
            known = f"error {error:.4f}" if math.isfinite(error) else "error not known yet"
            print(f"{known}, tolerance {tolerance:g}")

    def batch(self, levels: int) -> None:
        """Count a batch.

        Args:
            levels: Number of levels, 0 if unknown.
        """
        self._seen += 1
        if self._verbose != 1:
            return
        total = self._total
        if self._bar is None:
            self._bar = keras.utils.Progbar(None, unit_name=self._unit)
        if total is None:
            self._bar.update(self._seen, finalize=False)
            return
        levels = max(levels, self._level)
        self._bar.target = total * levels
        done = total * (self._level - 1) + self._seen
        self._bar.update(done, finalize=False)

    def end(self) -> None:
        """Finish the bar, or print the single line."""
        if self._verbose == 2:
            seconds, passes = time.perf_counter() - self._began, self._level
            print(
                f"Population statistics, {self._method}: {passes} pass{'es' * (passes != 1)}, "
                f"{seconds:.1f} s"
            )
        if self._bar is not None:
            self._bar.target = self._bar.target or self._seen
            self._bar.update(self._bar.target, finalize=True)
