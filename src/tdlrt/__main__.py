"""`python -m tdlrt` tells where the command line is: in a distribution of its own."""

import sys

if __name__ == "__main__":
    sys.exit(
        "error: the command line is in the package tdlrt-lab; run: pip install 'tdlrt[cli]', then "
        "tdlrt, or python -m tdlrt_lab"
    )
