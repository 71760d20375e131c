"""Generate images: the one sampling path, a base model with its adapters, and the plan of one call."""
