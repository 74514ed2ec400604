"""A model in one process: run batches through one level on each of its devices."""

import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, NoReturn, TypeVar

import keras
import numpy as np
import tensorflow as tf

from tfbn.models import assignment, keras_models
from tfbn.population import PopulationStats
from tfbn.stats import moments
from tfbn.stats.methods import METHODS
from tfbn.stats.moments import Moments
from tfbn.sweep import results
from tfbn.sweep.batches import Batch, BatchReader, flatten
from tfbn.sweep.cut_passes import CutPasses
from tfbn.sweep.fixed_point import FixedPoint
from tfbn.sweep.frontiers import Frontier
from tfbn.sweep.network import Network, devices
from tfbn.sweep.observation import UnobservableError
from tfbn.sweep.state import NetworkFacts, Site, SweepState
from tfbn.sweep.trace import SiteMoments
from tfbn.sweep.trained_layers import require_trained, trained_calls
from tfbn.sweep.uncut_passes import UncutPasses


class SweptBatch(NamedTuple):
    """One batch of a level.

    Attributes:
        batch: The `Batch`.
        frontier: The `Frontier` that the batch reached, if any.
        state: The `SweepState` after the batch.
    """

    batch: Batch
    frontier: Frontier | None
    state: SweepState


class Replica:
    """A model with the layers to sweep, and a network on each device of the process.

    Args:
        model: A built model.
        layers: Path -> layer to sweep.
        include_frozen: Whether to sweep layers that `fit` does not train as well.
        trained: Whether training has changed these layers, so that no trace is required to choose
            them.
        warned: Whether the warnings about the network have been issued.

    Attributes:
        model: The model.
        layers: Path -> layer to sweep, before the first batch shows which layers train.
    """

    def __init__(
        self,
        model: keras.Model,
        layers: Mapping[str, keras.Layer],
        *,
        include_frozen: bool = False,
        trained: bool = False,
        warned: bool = False,
    ):
        self.model = model
        self.layers = layers
        self._lock = threading.Lock()
        self._trained = trained
        self._warned = warned
        self._warned_of_loops = warned
        stats = PopulationStats.read(model)
        path_of = {id(layer): path for path, layer in keras_models.batch_norm_layers(model).items()}
        self._previous = {path: stats[path_of[id(layer)]] for path, layer in layers.items()}
        self._fingerprint = stats.fingerprint
        self._paths: tuple[str, ...] | None = None
        self._devices: list[_Device] = []
        if include_frozen or keras_models.always_passes_training_on(model):
            self._build_networks(layers)

    def fork(self) -> "Replica":
        """Return a replica with the same networks, for other populations."""
        other = copy.copy(self)
        other._devices = [_Device(device.network, device.name) for device in self._devices]
        return other

    @property
    def any_batch_size(self) -> bool:
        """Whether the recorded inputs allow batches of any size."""
        inputs = getattr(self.model, "inputs", None) or []
        return bool(inputs) and all(tensor.shape[0] is None for tensor in inputs)

    def initial_state(self, method: str, first: Batch | None = None) -> SweepState:
        """Return the state where a sweep begins.

        Args:
            method: The name of the method.
            first: The first batch of the data, which shows the layers that train. `None` to
                include all candidates.
        """
        self._choose_layers(first)
        paths = tuple(self.layers) if self._paths is None else self._paths
        uncut = METHODS[method].by_level and self.model.run_eagerly
        return SweepState(method, self._fingerprint, paths, FixedPoint() if uncut else None)

    def run_level(
        self,
        state: SweepState,
        work: Iterable[tuple[Batch, Frontier | None]],
        reached: SweepState | None = None,
        static: bool = False,
    ) -> Iterator[SweptBatch]:
        """Run batches through one level, on each device in turn.

        If a batch shows that the network cannot be cut at its levels, the iterator ends with a
        state that has no batches.

        Args:
            state: The state at the beginning of the level.
            work: Batches, each with the frontier where it starts, or `None` for its inputs.
            reached: The state after batches of the level that have already run.
            static: Whether the batch size is part of the signature, see `Network.trace`.

        Yields:
            `SweptBatch`, in the order of `work`.
        """
        if not self._devices:  # No data.
            return
        for device in self._devices:
            device.begin_level(state, self.layers, static)
        jobs = (
            functools.partial(self._devices[batch.index % len(self._devices)].run, batch, start)
            for batch, start in work
        )
        noted: NetworkFacts | None = None
        reached = reached or state
        if state.level == 1 and self._paths is not None:  # The data shows which layers train.
            reached = dataclasses.replace(reached, paths=self._paths)
        for batch, frontier, site_moments, facts in _in_turn(jobs, len(self._devices)):
            if facts is not noted:
                self._warn_of_loops(state.method, facts)
                noted, reached = facts, reached.note(facts)
                if reached.turned_uncut(state):
                    yield SweptBatch(batch, None, reached.without_batches())
                    return
            reached = reached.add(batch, site_moments)
            yield SweptBatch(batch, frontier, reached)

    def sweep_shard(self, state: SweepState, batches: BatchReader) -> SweepState:
        """Run one level over some batches, in a sweep that began in another process.

        Locks the replica: one thread at a time.

        Args:
            state: The state at the beginning of the level.
            batches: The `tfbn.sweep.batches.Batches`, which are read once.

        Returns:
            The state after the batches, without the levels before, which all processes have.

        Raises:
            ValueError: If the weights differ between the processes.
        """
        if state.fingerprint != self._fingerprint:
            raise ValueError(
                "Expected every process to load the same weights. Received: fingerprint "
                f"{self._fingerprint[:12]}, not {state.fingerprint[:12]}."
            )
        reached = state
        with self._lock:
            self._choose_layers(batches.first())
            work = ((batch, None) for batch in batches)
            for swept in self.run_level(state, work, static=batches.static):
                reached = swept.state
        return dataclasses.replace(reached, settled={})

    def finish(self, state: SweepState) -> PopulationStats:
        """Return the result of a complete sweep, and warn about doubtful statistics."""
        previous = PopulationStats(
            {path: self._previous[path] for path in state.paths},
            method="assigned",
            fingerprint=self._fingerprint,
        )
        return results.finish(state, self.model, self.layers, previous, self._warned)

    def _choose_layers(self, first: Batch | None) -> None:
        """Remove the layers that do not train in a trace of the first batch."""
        if self._paths is not None or first is None:
            return
        frozen, _, ignored = trained_calls(self.model, self.layers, first.inputs)
        layers = self.layers
        if not self._trained:
            require_trained(self.model, layers, frozen)
            layers = {path: layer for path, layer in layers.items() if path not in frozen}
        self._build_networks(layers, ignored)

    def _build_networks(
        self, layers: Mapping[str, keras.Layer], ignored: frozenset[Site] = frozenset()
    ) -> None:
        self._paths = tuple(layers)
        self._devices = [
            _Device(Network(self.model, layers, ignored, name), name)
            for name in devices(self.model)
        ]

    def _warn_of_loops(self, method: str, facts: NetworkFacts) -> None:
        """Warn, before the first batch is added, that the passes may not converge."""
        if not self._warned_of_loops and METHODS[method].by_level:
            results.warn_of_loops(facts.looping)
        self._warned_of_loops = True


# (batch, frontier, (site, moments) of its calls, facts of the trace).
_BatchResult = tuple[Batch, Frontier | None, list[tuple[Site, Moments]], NetworkFacts]
_Result = TypeVar("_Result")


class _Device:
    """The network on one device, with the populations on that device.

    Attributes:
        network: The `Network`.
        name: The name of the device; `None` for TensorFlow's choice.
    """

    def __init__(self, network: Network, name: str | None):
        self.network = network
        self.name = name
        # Path or site -> (moments, tensor on the device).
        self._placed: dict[str | Site, tuple[Moments, tf.Tensor]] = {}

    def begin_level(
        self, state: SweepState, layers: Mapping[str, keras.Layer], static: bool
    ) -> None:
        """Create the passes of a level, and copy its populations to the device."""
        before, self._placed = self._placed, {}
        with self._scope():
            for key, population in state.populations.items():
                if key in before and population is before[key][0]:
                    self._placed[key] = before[key]
                    continue
                values = population.mean, moments.variance(population)
                if isinstance(key, str):  # Rounded like the variables that inference reads.
                    values = assignment.round_to_variables(key, *values, layers[key])
                self._placed[key] = population, tf.constant(np.stack(values))
        self._populations = {key: tensor for key, (_, tensor) in self._placed.items()}
        eager = self.network.model.run_eagerly
        cut = METHODS[state.method].by_level and state.fixed_point is None
        self._state = state
        self._passes: CutPasses | UncutPasses = (
            CutPasses(self.network, static) if cut else UncutPasses(self.network, static, eager)
        )

    def run(self, batch: Batch, start: Frontier | None) -> _BatchResult:
        """Run one batch through the level."""
        level, method = self._state.level, self._state.method
        with self._scope():
            with naming(self.network.model, batch):
                observed = self._passes.run(batch, start, level, self._populations)
            site_moments = _moments(batch, observed.calls, method)
            if level == 1:
                _refuse_nan(batch, observed.facts.not_nan)
        return batch, observed.frontier, site_moments, observed.facts

    def _scope(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.name is None else tf.device(self.name)


def _in_turn(jobs: Iterable[Callable[[], _Result]], at_a_time: int) -> Iterator[_Result]:
    """Yield the results of functions in their order; several run at a time.

    Args:
        jobs: An iterable of functions without arguments.
        at_a_time: Number of running functions, one for each device.
    """
    if at_a_time == 1:
        for job in jobs:
            yield job()
        return
    with concurrent.futures.ThreadPoolExecutor(at_a_time) as pool:
        running: collections.deque[concurrent.futures.Future[_Result]] = collections.deque()
        for job in jobs:
            if len(running) == at_a_time:
                yield running.popleft().result()
            running.append(pool.submit(job))
        while running:
            yield running.popleft().result()


def _moments(batch: Batch, calls: list[SiteMoments], method: str) -> list[tuple[Site, Moments]]:
    """Compute (site, moments) of a batch; raise an error for moments that are not finite."""
    entered = [(site, values) for site, of_call in calls for values in of_call]
    if not entered:
        return []
    sites, values = zip(*entered, strict=True)
    channels = [value.shape[1] for value in values]
    # One transfer, because each waits for the device, and there may be many small sites.
    together = tf.concat(values, 1).numpy()
    batch_moments = moments.of_batch(*together, method=method)
    finite = moments.finite(batch_moments)
    if not finite.all():
        first = np.searchsorted(np.cumsum(channels), np.argmin(finite), side="right")
        _refuse(batch, sites[first], method, *values[first].numpy())
    return list(zip(sites, batch_moments.split(channels), strict=True))


def _refuse(
    batch: Batch,
    site: Site,
    method: str,
    count: np.ndarray,
    mean: np.ndarray,
    variance: np.ndarray,
) -> NoReturn:
    """Raise the error for moments that are not finite."""
    finite = moments.finite(moments.of_batch(count, mean, variance, method=method))
    averaged = METHODS[method].averages_variances
    if averaged and np.isfinite(variance).all() and count.min() == 1:
        raise ValueError(
            f"Expected two values per channel for method={method!r}. Received: m = 1 for layer "
            f"{site.path!r}, in {batch.name}. Use another batch size, or method='pooled'."
        )
    channel = int(np.argmin(finite))
    raise ValueError(
        f"Expected finite values to enter layer {site.path!r}. Received: in {_location(batch)}, "
        f"channel {channel}, mean {mean[channel]}, variance {variance[channel]}. "
        f"{_reason(batch)}"
    )


def _refuse_nan(batch: Batch, indices: Iterable[int]) -> None:
    # NumPy, because this runs on the devices' threads: when an iterator ends in another thread,
    # TensorFlow may raise its error in any operation that copies between devices.
    flat = flatten(batch.inputs)
    if any(np.isnan(flat[index].numpy()).any() for index in indices):
        raise ValueError(
            f"Expected finite data. Received: NaN in {_location(batch)}. Clean the data."
        )


def _location(batch: Batch) -> str:
    """Return the name of the batch, or of its first row with NaN or Inf if rows were drawn."""
    rows = batch.position.rows
    if rows is None or batch.inputs is None:
        return batch.name
    for value in flatten(batch.inputs):
        if value.dtype.is_floating and value.shape.rank and value.shape[0] == len(rows):
            finite = np.isfinite(value.numpy().reshape(len(rows), -1)).all(axis=1)
            if not finite.all():
                return f"row {rows[np.argmin(finite)]} (counting from 0)"
    return batch.name


def _reason(batch: Batch) -> str:
    if batch.inputs is None:  # The frontier was stored, so the data was finite in an earlier pass.
        return "The values overflow inside the network. Look at its weights and dtypes."
    floating = [value for value in flatten(batch.inputs) if value.dtype.is_floating]
    if all(np.isfinite(value.numpy()).all() for value in floating):
        return (
            "The data is finite, so the values overflow inside the network. Look at its weights "
            "and dtypes."
        )
    return "The data holds NaN or Inf. Clean it."


@contextlib.contextmanager
def naming(model: keras.Model, batch: Batch) -> Iterator[None]:
    """Context manager: convert any error of a model on a batch to a `ValueError` that names it."""
    try:
        yield
    except UnobservableError as error:
        raise ValueError(str(error)) from None
    except Exception as error:
        shapes = keras.tree.map_structure(
            lambda value: f"{value.dtype.name}{value.shape}", batch.inputs
        )
        raise ValueError(
            f"Expected batches that model {model.name!r} takes. Received: {batch.name} with inputs "
            f"{shapes}, on which it raised {type(error).__name__}: {error}"
        ) from error
