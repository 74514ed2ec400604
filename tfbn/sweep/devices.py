"""The devices that share a sweep in one process."""

import collections
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import keras
import tensorflow as tf

Result = TypeVar("Result")


def devices(model: keras.Model) -> list[str | None]:
    """The devices of this process that hold a replica of a model.

    `[None]`, TensorFlow's choice, without a strategy that mirrors the model.
    """
    mirrored = tf.distribute.MirroredStrategy, tf.distribute.MultiWorkerMirroredStrategy
    strategy = model.distribute_strategy
    if model.run_eagerly or not isinstance(strategy, mirrored):
        return [None]
    return list(strategy.extended.worker_devices)


def in_turn(jobs: Iterable[Callable[[], Result]], at_a_time: int) -> Iterator[Result]:
    """The results of some functions in their order, with several of them running at a time.

    Args:
        jobs: An iterable of functions without arguments.
        at_a_time: How many, one for each device.
    """
    if at_a_time == 1:
        for job in jobs:
            yield job()
        return
    with concurrent.futures.ThreadPoolExecutor(at_a_time) as pool:
        running: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
        for job in jobs:
            if len(running) == at_a_time:
                yield running.popleft().result()
            running.append(pool.submit(job))
        while running:
            yield running.popleft().result()
