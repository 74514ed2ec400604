"""The options of a sweep."""

import dataclasses
import os

from tfbn import arguments
from tfbn.stats.methods import METHODS


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """The options of a sweep, see `tfbn.collect`.

    Raises:
        ValueError: For invalid values.
    """

    method: str = "exact"
    batch_size: int | None = None
    steps: int | None = None
    include_frozen: bool = False
    tolerance: float | None = None
    memory_limit: int | None = None
    checkpoint: str | os.PathLike | None = None
    verbose: int | str = "auto"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(
                f"Expected method to be one of {tuple(METHODS)}. Received: method={self.method!r}."
            )
        # The dataclass is frozen: store the validated number with `object.__setattr__`.
        object.__setattr__(self, "tolerance", arguments.tolerance(self.tolerance))
        if self.checkpoint is not None and self.tolerance is not None:
            raise ValueError(
                f"Expected no checkpoint={os.fspath(self.checkpoint)!r} with "
                f"tolerance={self.tolerance:g}. Leave out `checkpoint`."
            )
        arguments.positive(batch_size=self.batch_size, steps=self.steps)
