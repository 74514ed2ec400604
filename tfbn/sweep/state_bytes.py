"""Convert the state of a sweep to bytes, for checkpoints and other processes."""

import dataclasses

import numpy as np

from tfbn.files import sealed
from tfbn.stats.methods import METHODS
from tfbn.stats.moments import Moments
from tfbn.sweep.fixed_point import FixedPoint
from tfbn.sweep.state import Site, SweepState

_KIND = "tfbn sweep state 1"


def pack(state: SweepState) -> bytes:
    """Convert a state to bytes."""
    sites = {"settled": state.settled, "moments": state.moments}
    header = {
        field.name: getattr(state, field.name)
        for field in dataclasses.fields(state)
        if field.name not in sites
    }
    if state.fixed_point is not None:
        header["fixed_point"] = dataclasses.asdict(state.fixed_point)
    arrays: dict[str, np.ndarray] = {}
    for name, by_site in sites.items():
        header[name] = [list(site) for site in by_site]
        arrays |= {f"{name}_{i}": m.rows for i, m in enumerate(by_site.values())}
    return sealed.pack({"kind": _KIND, "state": header}, arrays)


def unpack(content: bytes) -> SweepState:
    """Load a state from the bytes of `pack`.

    Raises:
        ValueError: If the bytes are damaged or others.
    """
    header, arrays = sealed.unpack(content)
    try:
        if header["kind"] != _KIND:
            raise ValueError("another kind of file")
        values = header["state"]
        for name in ("settled", "moments"):
            values[name] = {
                Site(*site): _possible(arrays[f"{name}_{i}"]) for i, site in enumerate(values[name])
            }
        for name in ("paths", "by_batch", "first"):
            values[name] = None if values[name] is None else tuple(values[name])
        if (passes := values["fixed_point"]) is not None:
            recurrent = tuple(passes["recurrent"])
            values["fixed_point"] = FixedPoint(**passes | {"recurrent": recurrent})
        state = SweepState(**values)
        _check_types(state)
        return state
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"Expected the state of a sweep. Received: {len(content)} other bytes ({error!r})."
        ) from error


def _check_types(state: SweepState) -> None:
    """Raise `ValueError` for impossible values."""
    passes = state.fixed_point or FixedPoint()
    whole = (state.level, passes.passes, state.samples, state.batches, state.batch_size)
    whole += (state.data, state.keys, *state.levels.values(), *(state.first or ()))
    names = (*state.paths, *passes.recurrent, *state.by_batch, *state.levels, state.fingerprint)
    sites = (*state.settled, *state.moments)
    flags = (passes.behind, state.complete, state.random)
    possible = (
        state.method in METHODS
        and (state.first is None or len(state.first) == 3)
        and all(type(number) is int and number >= 0 for number in whole)
        and all(isinstance(name, str) for name in names)
        and all(isinstance(site.path, str) and type(site.call) is int for site in sites)
        and all(isinstance(flag, bool) for flag in flags)
    )
    if not possible:
        raise ValueError("values that no sweep has")


def _possible(values: np.ndarray) -> Moments:
    """Validate an array and convert it to moments."""
    if values.ndim != 2 or len(values) != 10 or values.dtype != np.float64:
        raise ValueError("an array that is no moments")
    if not (np.isfinite(values).all() and (values[[0, 2, 3, 4, 7, 9]] >= 0).all()):
        raise ValueError("moments that no data has")
    return Moments(values)
