"""Product-of-Experts language models: data, training, analysis, release and decoding."""

__version__ = "0.1.0"
