"""`python -m diffusekrona_train --config dog.yaml` is `krona-train --config dog.yaml`."""

from __future__ import annotations

from diffusekrona_train.cli.train import main

if __name__ == "__main__":
    main()
