"""A tokenizer over single bytes and word-like texts, small enough for a vocabulary of 97."""

import numpy as np

BOS = 96


class ByteTokenizer:
    """Printable ASCII, one id per byte; ``{`` and ``|`` stand for themselves, ``~`` encodes é (2 bytes)."""

    vocab_size = 97
    bos_id = BOS
    token_bytes = np.array([1] * 94 + [2, 1, 0], dtype=np.int32)  # id 94 is é, id 96 the special token

    def bytes_of(self, index: int) -> bytes:
        return b"" if index == BOS else self.decode([index]).encode()

    def encode(self, text: str) -> list[int]:
        return [94 if letter == "é" else 95 if letter == "\n" else ord(letter) - 32 for letter in text]

    def encode_batch(self, texts):
        return [np.array(self.encode(text), dtype=np.uint16) for text in texts]

    def decode(self, ids) -> str:
        return "".join({94: "é", 95: "\n", 96: "<|bos|>"}.get(int(index), chr(int(index) % 94 + 32)) for index in ids)


def make_texts(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Random texts of 1 .. longest letters."""
    generator = np.random.default_rng(seed)
    letters = list("abcdefghij é\n.,")
    return ["".join(generator.choice(letters, size=generator.integers(1, longest + 1))) for _ in range(count)]


def bpb(sums, path: str) -> float:
    """Bits per UTF-8 byte of a path, by the definition."""
    return float(sums.nats[path].sum() / np.log(2) / sums.bytes.sum())


def accuracy(sums, path: str) -> float:
    """Share of targets that are the path's top-1 token."""
    return float(sums.correct[path].sum() / sums.targets.sum())
