"""`python -m tdlrt` is the command line; `torchrun ... -m tdlrt` starts it on several processes."""

from tdlrt.cli import main

if __name__ == "__main__":
    main()
