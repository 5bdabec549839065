"""``python -m cognica_poe.cli``, which torchrun starts."""

from cognica_poe.cli.main import main

if __name__ == "__main__":
    main()
