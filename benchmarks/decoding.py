"""Decoding speed: the same as ``cognica-poe bench decode``, whose options it takes."""

import sys

from cognica_poe.cli.main import main

if __name__ == "__main__":
    main(["bench", "decode", *sys.argv[1:]])
