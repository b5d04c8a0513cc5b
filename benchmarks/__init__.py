"""Measurements: `python -m benchmarks.bounds`, `python -m benchmarks.violations`, `python -m benchmarks.attacks`."""
