"""What ships inside every release: the model, its cache and its decoding, with no import of the rest of the package."""
