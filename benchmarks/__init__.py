"""Measurements of the bounds: `python -m benchmarks.bounds`, `python -m benchmarks.violations`; see README.md here."""
