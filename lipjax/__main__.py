"""`python -m lipjax` is the command `lipjax`."""

import sys

from lipjax.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
