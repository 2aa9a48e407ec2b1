"""`python -m tdlrt_lab` is `tdlrt`; `torchrun ... -m tdlrt_lab` starts it on several processes."""

from tdlrt_lab.cli import main

if __name__ == "__main__":
    main()
