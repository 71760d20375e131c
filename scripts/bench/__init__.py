"""Benchmarks of speed and memory, one file each: `python -m scripts.bench.layer --help`.

`scripts/gpu/measure.sh` (`python -m scripts.bench`) runs them all at real size on a GPU and keeps one table.
"""
