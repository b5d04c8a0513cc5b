"""Measurements: `python -m benchmarks.bounds`, `python -m benchmarks.kinds`, `python -m benchmarks.violations`."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread for all; the libraries read it when they are imported
