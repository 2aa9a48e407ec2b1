"""`python -m tdlrt` says how to install the command line, which is a separate distribution."""

import sys

if __name__ == "__main__":
    sys.exit(
        "error: the command line is in the package tdlrt-lab; run: pip install 'tdlrt[cli]', then "
        "tdlrt, or python -m tdlrt_lab"
    )
