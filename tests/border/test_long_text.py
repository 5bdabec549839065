"""No text costs more than its length: runs of one kind of character, of two in turn, and of nearly very long space."""

import itertools
import random
import string
import sysconfig
import time
from pathlib import Path

import pytest

from cognica_poe.data import tokenizer as tokenizers_own
from cognica_poe.data import white_space
from cognica_poe.data.rows.packing import apply_case, pack
from cognica_poe.data.tokenizer import SPLIT_PATTERN, load_tokenizer, train_tokenizer
from cognica_poe.data.white_space import LONG_SPACE, SPACES, cut_at_long_space, long_spaces
from tests.data.corpora import made_up_text, small, write_parquet

KINDS = {
    "space": " ", "tab": "\t", "line end": "\n", "carriage return": "\r", "CRLF": "\r\n", "no-break space": "\xa0",
    "ideographic space": "\u3000", "line separator": "\u2028", "lower case": "a", "upper case": "A", "digit": "7",
    "Arabic digit": "\u0663", "dash": "-", "mixed marks": "-=_!?()", "apostrophe": "'", "contraction": "'s",
    "long contraction": "'ll", "CJK": "日", "Hangul": "가", "Arabic": "ش", "Devanagari": "कि", "Thai": "กำ",
    "combining marks": "\u0301", "letter with mark": "e\u0301", "emoji": "😀", "ZWJ sequence": "👨\u200d👩\u200d👧",
    "NUL": "\0", "private use": "\ue000", "mathematical letters": "\U0001d400", "sigma": "Σ", "dotted I": "İ",
    "soft hyphen": "\xad", "space and line end": " \n", "line end and mark": "-\n", "space and letter": " a",
    "space and mark": " -", "space and digit": " 1", "letter and digit": "a1", "case in turn": "aA",
    "letter and mark": "a-", "sigma and mark": "Σ'", "text of a program": "    x = 1\n",
    "name of a special token": "<|bos|>",
}  # fmt: skip
LENGTHS = (50_000, 400_000)
SLOWER = 3 * LENGTHS[1] / LENGTHS[0]  # quadratic time is 64 times as long, linear 8 times
FLOOR = 0.02  # seconds of processor time; below, a ratio says nothing


def run_of(unit, length):
    return (unit * (length // len(unit) + 1))[:length]


def texts_of(length):
    """Every kind, 40 pairs of kinds in blocks, random letters, and space in runs that are just not very long."""
    rng = random.Random(length)
    yield from ((name, run_of(unit, length)) for name, unit in KINDS.items())
    for (one, first), (two, second) in random.Random(5).sample(list(itertools.permutations(KINDS.items(), 2)), 40):
        yield f"{one}, then {two}", run_of(first, length // 2) + run_of(second, length // 2)
    yield "random letters", "".join(rng.choices(string.ascii_lowercase, k=length))
    for space in (" ", "\t", "\n", "\r\n"):
        yield f"{space!r} just not very long", run_of(run_of(space, LONG_SPACE - 1) + ".", length)


def seconds(work, *arguments):
    begin = time.process_time()
    work(*arguments)
    return time.process_time() - begin


@pytest.fixture(scope="module")
def usual():
    library = Path(sysconfig.get_paths()["stdlib"])
    return [(library / f"{name}.py").read_text() for name in ("argparse", "ast", "enum", "tarfile", "turtle")]


@pytest.fixture(scope="module")
def tokenizer(usual, tmp_path_factory):
    return train_tokenizer(usual, 2000, tmp_path_factory.mktemp("long") / "tokenizer")


def test_encoding_takes_time_in_proportion(tokenizer, capsys):
    slowest = ("", 0.0)
    times = {length: {} for length in LENGTHS}
    for length, by_kind in times.items():
        for name, text in texts_of(length):
            by_kind[name] = seconds(tokenizer.encode_batch, [text])
            slowest = max(slowest, (name, by_kind[name]), key=lambda item: item[1])
    for name, long in times[LENGTHS[1]].items():
        assert long < SLOWER * max(times[LENGTHS[0]][name], FLOOR), name
    assert slowest[1] < 3
    with capsys.disabled():
        print(
            f"\nlong text, encoding: {len(by_kind)} kinds tried, slowest {slowest[0]}: {slowest[1]:.2f} s for 400,000"
        )


def test_ids_are_those_of_the_reference(tokenizer):
    for name, text in texts_of(LENGTHS[0]):
        ids = tokenizer.encode(text)
        assert ids == tokenizer.reference_encode(text), name
        assert tokenizer.encode_batch([text])[0].tolist() == ids, name


def test_every_cut_at_long_space_is_a_border_of_words(tokenizer, monkeypatch, capsys):
    """Very long is six characters here, so that all that can stand around space can be tried."""
    monkeypatch.setattr(white_space, "LONG_SPACE", 6)
    monkeypatch.setattr(tokenizers_own, "LONG_SPACE", 6)
    rng, cut = random.Random(0), 0
    spaces, others = [" ", " ", "\n", "\r", "\t", "\u3000"], [unit for unit in KINDS.values() if unit.strip(SPACES)]
    for _ in range(20_000):
        blocks = []
        for _ in range(rng.randint(1, 4)):
            few = rng.sample(spaces, rng.randint(1, 3))
            blocks.append(rng.choice(others) * rng.randint(0, 2))
            blocks.append("".join(rng.choice(few) for _ in range(rng.randint(0, 14))))
        text = "".join(blocks) + rng.choice(["", *others])
        cut += any(is_space for _, is_space in cut_at_long_space(text, tokenizer._keeps_line_ends))
        ids = tokenizer.encode(text)
        assert ids == tokenizer.reference_encode(text), repr(text)
        assert tokenizer.encode_batch([text])[0].tolist() == ids, repr(text)
    assert cut > 5000
    with capsys.disabled():
        print(f"\nlong text, cuts: 20000 texts tried, {cut} of them with very long space")


def test_long_space_is_found_wherever_it_begins(monkeypatch):
    monkeypatch.setattr(white_space, "LONG_SPACE", 5)
    rng = random.Random(1)
    for _ in range(5000):
        text = "".join(rng.choice("  \n\tx") for _ in range(rng.randint(0, 60)))
        runs, at = [], 0
        for is_space, group in itertools.groupby(text, lambda character: character in SPACES):
            size = len(list(group))
            if is_space and size >= 5:
                runs.append((at, at + size))
            at += size
        assert list(long_spaces(text)) == runs


def test_space_is_what_the_split_pattern_calls_space():
    from tokenizers import Regex, pre_tokenizers

    pattern = pre_tokenizers.Split(Regex(r"\s"), "removed")
    found = [c for c in map(chr, [*range(0xD800), *range(0xE000, 0x33000)]) if not pattern.pre_tokenize_str(c)]
    assert sorted(SPACES) == found


@pytest.mark.parametrize(("before", "after"), [("x", "y"), ("-", "-"), ("", "")])
@pytest.mark.parametrize("space", [" ", "\t", " \n", "\n"])
def test_space_of_a_million_characters(tokenizer, space, before, after):
    text = before + run_of(space, 1_000_000) + after
    begin = time.process_time()
    ids = tokenizer.encode_batch([text])[0]
    assert time.process_time() - begin < 5
    assert tokenizer.token_bytes[ids].sum() == len(text) and tokenizer.decode(ids) == text


def test_training_takes_time_in_proportion(tmp_path, capsys):
    few = made_up_text(random.Random(3), 2000)

    def train(text):
        train_tokenizer([few, text], 400, tmp_path / "tokenizer")

    makers = {name: lambda length, unit=unit: run_of(unit, length) for name, unit in KINDS.items()}
    makers["words of every length"] = lambda length: " ".join("a" * n for n in range(1, round((2 * length) ** 0.5)))
    makers["random letters"] = lambda length: "".join(random.Random(2).choices(string.ascii_lowercase, k=length))
    slowest = ("", 0.0)
    for name, make in makers.items():
        short, long = (seconds(train, make(length // 2)) for length in LENGTHS)
        slowest = max(slowest, (name, long), key=lambda item: item[1])
        assert long < SLOWER * max(short, FLOOR), name
    assert slowest[1] < 10
    with capsys.disabled():
        print(f"\nlong text, training: {len(makers)} kinds tried, slowest {slowest[0]}: {slowest[1]:.2f} s")


def test_cutting_long_words_leaves_the_tokenizer_of_usual_text_as_it_is(usual, tokenizer, tmp_path):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    plain = Tokenizer(models.BPE())
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"), bytes_only])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=2000 - 9, min_frequency=2, show_progress=False, initial_alphabet=alphabet)
    plain.train_from_iterator(usual, trainer)
    ours = Tokenizer.from_file(str(tokenizer.folder / "tokenizer.json"))
    assert plain.get_vocab(False) == ours.get_vocab(False)
    assert [ours.encode(text, add_special_tokens=False).ids for text in usual] == [plain.encode(t).ids for t in usual]
    again = load_tokenizer(tokenizer.folder)._backend.pre_tokenizer  # nothing of the cut stays in the file
    assert len(again.pre_tokenize_str("a" * 2000)) == 1


def test_a_document_beyond_the_cap_is_cut_at_a_character(usual, tmp_path):
    text = "日本 " * 100_000
    cut = text.encode()[:1000].decode(errors="ignore")
    whole, part = (train_tokenizer([*usual, t], 400, tmp_path / n, max_bytes=sum(len(u.encode()) for u in usual) + 1000)
                   for n, t in (("whole", text), ("part", cut)))  # fmt: skip
    assert whole.sha256 == part.sha256


def test_changing_case_and_packing_take_time_in_proportion(tokenizer, tmp_path, capsys):
    for name, unit in KINDS.items():
        for case in (1, 2):
            assert seconds(apply_case, run_of(unit, 1_000_000), case) < 1, name
    rng, times = random.Random(4), {}
    fill = [{"text": made_up_text(rng, 300)} for _ in range(20)]
    for length in LENGTHS:
        units = [unit for unit in KINDS.values() if unit.strip() and "\0" not in unit]
        write_parquet(tmp_path / f"{length}.parquet", fill + [{"text": run_of(unit, length)} for unit in units])
        data = tmp_path / f"data-{length}"
        times[length] = [seconds(small, tmp_path / f"{length}.parquet", data)]
        out = tmp_path / f"rows-{length}"
        times[length].append(seconds(lambda d=data, o=out: pack(d, tokenizer, o, row_len=257, case_aug_prob=1.0)))
    for short, long in zip(times[LENGTHS[0]], times[LENGTHS[1]], strict=True):
        assert long < SLOWER * max(short, 0.2) and long < 20
    with capsys.disabled():
        built, packed = times[LENGTHS[1]]
        print(f"\nlong text, {len(units)} documents of 400,000: built in {built:.2f} s, packed in {packed:.2f} s")
