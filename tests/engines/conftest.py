"""A time limit for every test here: an engine that lost a worker may wait for it for ever."""

import signal

import pytest

SECONDS = 180


@pytest.hookimpl(wrapper=True)
def limited(item):
    """Fail a phase of a test that takes too long, wherever Python or an engine waits."""
    expired = []

    def stop(*_):
        expired.append(True)
        raise KeyboardInterrupt  # Ray lets no other error out of a wait.

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        return (yield)
    except KeyboardInterrupt:
        if not expired:
            raise
        raise TimeoutError(f"Expected {item.nodeid} to take at most {SECONDS} s.") from None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


pytest_runtest_setup = pytest_runtest_call = pytest_runtest_teardown = limited
