"""What every package may use: atomic files, the run folder, the device, injected faults."""
