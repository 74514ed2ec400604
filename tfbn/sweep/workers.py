"""Share a sweep between the processes of a `tf.distribute` strategy."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence

import keras
import numpy as np
import tensorflow as tf

from tfbn.population import PopulationStats
from tfbn.stats.moments import Moments
from tfbn.sweep import state_bytes
from tfbn.sweep.local_engine import LocalEngine
from tfbn.sweep.state import Site, SweepState, merge_shards


class Workers:
    """The processes that share the sweep of a model, including this one.

    Under `tf.distribute.MultiWorkerMirroredStrategy` these are its workers, which must make the
    same calls in the same order; otherwise only this process.

    Attributes:
        index: The number of this worker, from 0.
        count: Number of workers.
    """

    def __init__(self, model: keras.Model):
        self.index, self.count = 0, 1
        # Anything but a model is refused later.
        strategy = getattr(model, "distribute_strategy", None)
        if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
            return
        # `cluster_resolver.task_id` counts a chief and the others separately.
        local = len(strategy.extended.worker_devices)
        first, *_ = strategy.experimental_local_results(
            strategy.experimental_distribute_values_from_function(
                lambda context: context.replica_id_in_sync_group
            )
        )
        self.index = int(first) // local
        self.count = strategy.num_replicas_in_sync // local
        self._gather_words = tf.function(
            lambda words: strategy.gather(words, axis=0),
            input_signature=[tf.TensorSpec([None], tf.int32)],
            autograph=False,
        )

    def own_name(self, path: str | os.PathLike) -> str:
        """Return the name of a file of this worker, with its number if there are several."""
        return os.fspath(path) if self.count == 1 else f"{os.fspath(path)}.{self.index}"

    def engine(self, local: LocalEngine) -> "LocalEngine | WorkersEngine":
        """Return the engine of all workers, or the local one for a single process."""
        return local if self.count == 1 else WorkersEngine(self, local)

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """Context manager: raise an error of one worker on all.

        Raises:
            RuntimeError: If another worker raises an error or has ended.
        """
        if self.count == 1:
            yield
            return
        try:
            yield
        except Exception as error:
            self._exchange(_failure(error))
            raise
        self._require_success(self._exchange(b"+"))

    def gather(
        self, compute: Callable[[], SweepState], settled: dict[Site, Moments] | None = None
    ) -> list[SweepState]:
        """Return the `SweepState`s that a function computes on every worker, in order.

        Args:
            compute: The function.
            settled: The `settled` moments of the states if all workers have them, to send less.

        Raises:
            Exception: The error that `compute` raises here.
            RuntimeError: If it raises on another worker, or another worker has ended. There is no
                timeout for slow workers.
        """
        if self.count == 1:
            return [compute()]

        def message() -> bytes:
            state = compute()
            if settled is not None:
                state = dataclasses.replace(state, settled={})
            return state_bytes.pack(state)

        states = [state_bytes.unpack(content) for content in self._gather(message)]
        if settled is None:
            return states
        return [dataclasses.replace(state, settled=settled) for state in states]

    def gather_numbers(self, compute: Callable[[], Sequence[int]]) -> list[tuple[int, ...]]:
        """Return integers that a function computes on every worker, in order, see `gather`."""
        if self.count == 1:
            return [tuple(compute())]
        gathered = self._gather(lambda: np.array(compute(), np.int64).tobytes())
        return [tuple(np.frombuffer(numbers, np.int64).tolist()) for numbers in gathered]

    def _gather(self, compute: Callable[[], bytes]) -> list[bytes]:
        try:
            message = b"+" + compute()
        except Exception as error:
            self._exchange(_failure(error))
            raise
        messages = self._exchange(message)
        self._require_success(messages)
        return [message[1:] for message in messages]

    def _require_success(self, messages: Sequence[bytes]) -> None:
        for index, message in enumerate(messages):
            if message[:1] == b"-":
                raise RuntimeError(
                    f"Expected all {self.count} workers to succeed. Received: from worker {index} "
                    f"(counting from 0), {message[1:].decode()}"
                )

    def _gathered(self, words: np.ndarray) -> np.ndarray:
        with tf.device("CPU:0"):
            return self._gather_words(tf.constant(words)).numpy()

    def _exchange(self, message: bytes) -> list[bytes]:
        # int32, because bytes cannot be gathered. Header: worker and size, because messages are
        # ordered by the names of the tasks, 10 before 2.
        words = np.zeros(2 + -(-len(message) // 4), np.int32)
        words[:2] = self.index, len(message)
        words[2:].view(np.uint8)[: len(message)] = np.frombuffer(message, np.uint8)
        try:
            gathered = _interruptible(self._gathered, words)
        except tf.errors.OpError as error:
            raise RuntimeError(
                f"Expected all {self.count} workers to finish. Received: {type(error).__name__}, "
                f"because one has ended ({error.message}). Start all workers again."
            ) from error
        messages = {}
        while gathered.size:
            index, size = gathered[:2]
            end = 2 + -(-size // 4)
            messages[index] = gathered[2:end].tobytes()[:size]
            gathered = gathered[end:]
        return [messages[index] for index in range(self.count)]


class WorkersEngine:
    """Several workers, each with an engine for its shard, that merge their states.

    Args:
        workers: The `Workers`.
        local: The engine of this worker.
    """

    def __init__(self, workers: Workers, local: LocalEngine):
        self._workers = workers
        self._local = local

    def initial_state(self) -> SweepState:
        """Return the state where all begin. After a crash a worker may be one level ahead."""
        states = self._workers.gather(self._local.initial_state)
        return max(states, key=lambda state: state.level)

    def run_level(self, state: SweepState) -> SweepState:
        """Return the merged state after one level."""
        run = functools.partial(self._local.run_level, state)
        return merge_shards(self._workers.gather(run, settled=state.settled), state)

    def finish(self, state: SweepState) -> PopulationStats:
        """Return the result, the same on all workers."""
        return self._local.finish(state)


def _failure(error: Exception) -> bytes:
    return f"-{type(error).__name__}: {error}".encode()


def _interruptible(
    function: Callable[[np.ndarray], np.ndarray], argument: np.ndarray
) -> np.ndarray:
    """Run a function in another thread and return its result.

    Python handles Ctrl-C in this thread, but not in a thread that waits for TensorFlow.
    """
    answer: concurrent.futures.Future[np.ndarray] = concurrent.futures.Future()

    def run():
        try:
            answer.set_result(function(argument))
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return answer.result()
