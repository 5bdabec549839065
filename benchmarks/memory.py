"""Peak activation memory of one backward pass: the same as ``cognica-poe bench memory``, whose options it takes."""

import sys

from cognica_poe.cli.main import main

if __name__ == "__main__":
    main(["bench", "memory", *sys.argv[1:]])
