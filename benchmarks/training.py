"""Training throughput: the same as ``cognica-poe bench train``, whose options it takes."""

import sys

from cognica_poe.cli.main import main

if __name__ == "__main__":
    main(["bench", "train", *sys.argv[1:]])
