"""The benchmarks behind docs/performance.md, scale.md and evaluation.md: ``python -m benchmarks NAME``."""
