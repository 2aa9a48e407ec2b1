"""Runs `tdlrt` as `python -m tdlrt_lab`, or in several processes by `torchrun -m tdlrt_lab`."""

from tdlrt_lab.cli import main

if __name__ == "__main__":
    main()
