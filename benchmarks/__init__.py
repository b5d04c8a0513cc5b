"""Measurements: `python -m benchmarks.bounds`, `python -m benchmarks.violations`, `python -m benchmarks.attacks`."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread for all; the libraries read it when they are imported
