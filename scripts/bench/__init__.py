"""Speed and memory at real size: `scripts/gpu/measure.sh` runs every point of this folder and keeps one table."""
