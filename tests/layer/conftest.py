"""Fixture that runs kernels."""

import pytest
import tensorflow as tf
from kernel_reference import MODES

from tfbn.layer import kernels


@pytest.fixture(params=[*MODES, "GPU visible", "GPU visible, xla"])
def run(request, monkeypatch):
    """Return a runner for a mode, or for the path for GPUs, which is correct on any device."""
    if request.param.startswith("GPU visible"):
        monkeypatch.setattr(kernels, "_gpu_visible", lambda: True)
        monkeypatch.setattr(kernels, "_xla_runs_on_gpu", lambda: True)
        return MODES["xla"] if request.param.endswith("xla") else tf.function
    return MODES[request.param]
