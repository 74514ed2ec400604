"""Callbacks of `model.fit`: population statistics after training, and metrics during it."""
