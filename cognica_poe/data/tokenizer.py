"""Byte-level BPE: trained by ``tokenizers``, saved as an ``AutoTokenizer`` folder, bulk encoding by ``tiktoken``.

Vocabulary layout of the released models: byte and merge tokens first, then nine special tokens, ``<|bos|>`` first of
them (32,768 = 32,759 + 9, BOS id 32759). Both encoders hold the same merges; that their ids are equal is tested.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cognica_poe.data.white_space import LONG_SPACE, cut_at_long_space
from cognica_poe.errors import UserError
from cognica_poe.files import Manifest, atomic_folder, read_json, require_replaceable, write_json
from cognica_poe.seals import require_sha256

if TYPE_CHECKING:
    import tiktoken

SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
"""Behind the byte and merge tokens in the vocabulary, in this order."""
BOS = SPECIAL_TOKENS[0]
SPLIT_PATTERN = (  # GPT-4's, with digit groups of one or two
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
MAX_VOCAB = 65536
"""Most token ids: packed rows are uint16."""
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_LONG_WORD = 512  # characters; longer ones cost training the square of their length
_PIECE = 1_000_000
_LEAST_PART = 1_000_000


class Tokenizer:
    """A saved tokenizer: exact ids, fast bulk encoding, true byte lengths.

    ``bos_id`` starts every document, ``special_ids`` maps the name of a special token to its id, ``vocab_size`` is V,
    ``sha256`` (of ``tokenizer.json``) the tokenizer's identity.
    """

    def __init__(self, folder: Path) -> None:
        """Load ``folder/tokenizer.json``. Raises UserError if it is missing or no byte-level BPE with a BOS."""
        import tiktoken
        from tokenizers import Tokenizer as Backend

        self.folder = Path(folder)
        file = self.folder / "tokenizer.json"
        described = read_json(file, "tokenizer")
        try:
            pattern = described["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
            vocabulary = {token: int(index) for token, index in described["model"]["vocab"].items()}
            special = {token["content"]: int(token["id"]) for token in described["added_tokens"]}
            ranks = {_token_to_bytes(token): index for token, index in vocabulary.items() if token not in special}
            self.bos_id = special[BOS]
            self._backend = Backend.from_file(str(file))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(
                f"tokenizer {file} is not a byte-level BPE with a split pattern and {BOS}; make it with tokenizer train"
            ) from error
        self.vocab_size = max(max(ranks.values()), max(special.values())) + 1
        if len(ranks) + len(special) != self.vocab_size or self.vocab_size > MAX_VOCAB:
            raise UserError(
                f"tokenizer {file} has {len(ranks) + len(special)} tokens for {self.vocab_size} ids "
                f"(at most {MAX_VOCAB}, no gaps); make it with tokenizer train"
            )
        self.special_ids = special
        self.made_from: Mapping[str, str] = {}  # what its manifest says
        self.sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        self._bytes: list[bytes] = [b""] * self.vocab_size
        for token, index in ranks.items():
            self._bytes[index] = token
        build = partial(
            tiktoken.Encoding, mergeable_ranks=ranks, special_tokens=special, explicit_n_vocab=self.vocab_size
        )
        self._fast = build(self.sha256, pat_str=pattern)
        self._one_word = build(f"{self.sha256} whole", pat_str=r"[\s\S]+")

    @property
    def token_bytes(self) -> np.ndarray:
        """int32 [V]: length in bytes of every token, 0 for special tokens (true bytes, valid UTF-8 or not)."""
        return np.array([len(token) for token in self._bytes], dtype=np.int32)

    def bytes_of(self, index: int) -> bytes:
        """What one token stands for; nothing for a special token."""
        return self._bytes[index]

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` without BOS. A special token's name inside ``text`` is ordinary text."""
        return [index for encoder, part in self._parts(text) for index in encoder.encode_ordinary(part)]

    def _parts(self, text: str) -> Iterator[tuple[tiktoken.Encoding, str]]:
        """``text`` in parts, each with what encodes it."""
        if len(text) < LONG_SPACE:
            yield self._fast, text
            return
        for part, is_space in cut_at_long_space(text, self._keeps_line_ends):
            yield (self._one_word if is_space else self._fast), part

    def _keeps_line_ends(self, character: str) -> bool:
        """Whether the split pattern takes line ends behind ``character`` into the same word."""
        return len(self._backend.pre_tokenizer.pre_tokenize_str(f"{character}\n")) == 1

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Ids of each text without BOS, uint16 arrays; the same ids as ``encode``, from any number of ``threads``."""
        if threads == 1:
            return [self._encode_array(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self._encode_array, texts))

    def _encode_array(self, text: str) -> np.ndarray:
        parts = [encoder.encode_to_numpy(part, disallowed_special=()) for encoder, part in self._parts(text)]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts)).astype(np.uint16)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of ``ids``; bytes that are not valid UTF-8 become U+FFFD."""
        names = {} if skip_special_tokens else {index: name.encode() for name, index in self.special_ids.items()}
        return b"".join(names.get(int(i), self._bytes[i]) for i in ids).decode("utf-8", errors="replace")

    def reference_encode(self, text: str) -> list[int]:
        """What ``encode`` gives, by the ``tokenizers`` library: slow, to compare with."""
        self._backend.encode_special_tokens = True  # names of special tokens are text here too
        return self._backend.encode(text, add_special_tokens=False).ids


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer or release folder of ours (or that of the given ``tokenizer.json``).

    Raises UserError as ``Tokenizer``, and for a file of it that differs from the folder's manifest.
    """
    path = Path(path)
    folder = path.parent if path.name == "tokenizer.json" else path
    made_from = _compare(folder)
    tokenizer = Tokenizer(folder)
    tokenizer.made_from = made_from
    return tokenizer


def _compare(folder: Path) -> Mapping[str, str]:
    """Raise UserError unless the tokenizer's files are what the manifest lists; returns what it was made from."""
    if not (folder / _FILES[0]).is_file():
        raise UserError(f"tokenizer not found: {folder / _FILES[0]}")
    remedy = "restore it or make it with tokenizer train"
    manifest = Manifest.read(folder, remedy)
    for name in _FILES:
        require_sha256(folder / name, manifest.digests.get(name, "of no listed file"), "tokenizer", remedy)
    return manifest.made_from


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    out: Path,
    *,
    max_bytes: int = 200_000_000,
    made_from: Mapping[str, str] | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Tokenizer:
    """Train on at most ``max_bytes`` of ``texts`` and save to ``out``. Deterministic.

    The text that goes beyond ``max_bytes`` is cut there, and one that is more than a twentieth of it. A word of the
    split pattern that is longer than 512 characters counts as several, in training alone, so that time and memory stay
    in proportion to ``max_bytes``. ``made_from`` goes into the
    manifest. Raises UserError if ``out`` holds anything but a tokenizer of ours, or if ``vocab_size`` does not fit
    uint16 rows, leaves no room for merges, or is not reached.
    """
    require_replaceable(Path(out), "tokenizer")
    from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Backend

    merged = vocab_size - len(SPECIAL_TOKENS)
    if vocab_size > MAX_VOCAB:
        raise UserError(f"vocab_size {vocab_size} is too large: packed rows hold 16-bit ids; at most {MAX_VOCAB}")
    if merged < 256:
        raise UserError(f"vocab_size {vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} specials need 265")
    backend = Backend(models.BPE())
    words = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated")
    short = pre_tokenizers.Split(Regex(rf"[\s\S]{{{_LONG_WORD}}}"), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, short, as_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=merged,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    log(f"tokenizer: training {vocab_size} tokens on at most {max_bytes / 1e6:.0f} MB")
    backend.train_from_iterator(_capped(texts, max_bytes), trainer)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    reached = backend.get_vocab_size() + len(SPECIAL_TOKENS)
    if reached < vocab_size:
        raise UserError(
            f"the corpus is too small for a vocabulary of {vocab_size}: {reached} tokens were reached; "
            "use more text or a smaller vocab_size"
        )
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    bos_id = backend.token_to_id(BOS)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos_id)]
    )
    with atomic_folder(Path(out), "tokenizer", made_from=made_from) as folder:
        _write_tokenizer(backend.to_str(pretty=True), folder)
    tokenizer = load_tokenizer(out)
    log(f"tokenizer: {tokenizer.vocab_size} tokens, {BOS} is {tokenizer.bos_id}, saved to {out}")
    return tokenizer


def _write_tokenizer(tokenizer_json: str, folder: Path, model_max_length: int | None = None) -> None:
    """Write the files that ``AutoTokenizer.from_pretrained`` loads without remote code into ``folder``.

    It prepends BOS by itself, pads on the left with BOS, and never cleans up spaces. BOS starts every document, so it
    also ends generation (``eos_token``). ``model_max_length`` (tokens) is left open unless given.
    """
    names = {"bos_token": BOS, "eos_token": BOS, "pad_token": BOS}
    configuration = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "extra_special_tokens": list(SPECIAL_TOKENS[1:]),
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "truncation_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if model_max_length is not None:
        configuration["model_max_length"] = int(model_max_length)
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", configuration)
    write_json(folder / "special_tokens_map.json", {**names, "additional_special_tokens": list(SPECIAL_TOKENS[1:])})


def export_tokenizer(tokenizer: Path, release: Path, model_max_length: int) -> None:
    """Write the files of the ``tokenizer`` folder into ``release``, a folder in the making, with the context length."""
    _compare(Path(tokenizer))
    described = read_json(Path(tokenizer) / "tokenizer.json", "tokenizer")
    _write_tokenizer(json.dumps(described, indent=2, ensure_ascii=False), Path(release), model_max_length)


def copy_tokenizer(tokenizer_json: Path, out: Path, made_from: Mapping[str, str]) -> None:
    """Write the tokenizer folder ``out`` of a ``tokenizer.json`` that was trained elsewhere.

    Raises UserError if ``out`` holds anything but a tokenizer of ours.
    """
    with atomic_folder(Path(out), "tokenizer", made_from=made_from) as folder:
        _write_tokenizer(Path(tokenizer_json).read_bytes().decode(), folder)


def _capped(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """``texts`` up to ``max_bytes`` of UTF-8, the last one cut at a character, in pieces that can be split in memory.

    No text gives more than a twentieth of ``max_bytes``, or a megabyte where that is more: a single one must not decide
    the vocabulary.
    """
    left, most = max_bytes, max(max_bytes // 20, _LEAST_PART)
    for text in texts:
        if left <= 0:
            return
        data = text[:most].encode()
        part = min(left, most)
        yield from _pieces(text[:most] if len(data) <= part else data[:part].decode(errors="ignore"))
        left -= min(len(data), part)


def _pieces(text: str) -> Iterator[str]:
    """``text`` in pieces of at most a million characters that end at a space where there is one: what splits them gives
    up on longer white space, and takes 50 bytes a character."""
    done = 0
    while len(text) - done > _PIECE:
        space = text.rfind(" ", done + _PIECE // 2, done + _PIECE)
        end = space if space > 0 else done + _PIECE
        yield text[done:end]
        done = end
    yield text[done:]


@lru_cache(maxsize=1)
def _alphabet() -> dict[str, int]:
    """Character of the byte-level alphabet (GPT-2's) to its byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _token_to_bytes(token: str) -> bytes:
    alphabet = _alphabet()
    return bytes(alphabet[character] for character in token)
