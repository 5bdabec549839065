import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from cognica_poe.data.tokenizer import BOS, SPECIAL_TOKENS, Tokenizer, export_tokenizer, load_tokenizer, train_tokenizer
from cognica_poe.errors import UserError
from cognica_poe.files import MANIFEST, Manifest, verify_manifest, write_manifest

ALPHABETS = [
    "ab",
    "ab \n\t\r",
    "'sStTdDmMlLvVeErR \u017f\u212a",
    "0123456789 ٠١½",
    "-=_!?() \n",
    "éüñçß İ",
    "日本語の、。 ",
    "한국어 가각",
    "😀👍🏽\u200d👨‍👩‍👧🇰🇷 ",
    "\u00a0\u2003\u3000\u200b\ufeff x",
    "def return(self):\n    x += 1",
]


@pytest.fixture(scope="module")
def automatic(tokenizer):
    return AutoTokenizer.from_pretrained(tokenizer.folder)


def fuzz_texts(count):
    rng = random.Random(1)
    for _ in range(count):
        letters = rng.choice(ALPHABETS) + rng.choice(ALPHABETS)
        yield "".join(rng.choice(letters) for _ in range(rng.randint(1, 80)))


def test_layout_of_the_vocabulary(tokenizer):
    assert tokenizer.vocab_size == 500
    assert tokenizer.bos_id == 500 - 9
    assert [tokenizer.special_ids[name] for name in SPECIAL_TOKENS] == list(range(491, 500))


def test_both_encoders_agree_on_random_texts(tokenizer):
    for text in fuzz_texts(4000):
        assert tokenizer.encode(text) == tokenizer.reference_encode(text), repr(text)


def test_both_encoders_class_all_characters_alike(tokenizer):
    """Every code point of the planes in use, between letters, digits and spaces, where its class decides the split."""
    for start in [*range(0, 0x33000, 64), *range(0xE0000, 0xE0200, 64)]:
        characters = [chr(c) for c in range(start, start + 64) if not 0xD800 <= c < 0xE000]
        text = "".join(f"{c}a 1{c}{c} {c}'{c}" for c in characters)
        assert tokenizer.encode(text) == tokenizer.reference_encode(text), hex(start)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200))
def test_encoding_loses_nothing(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.token_bytes[ids].sum()) == len(text.encode())
    assert ids == tokenizer.encode_batch([text])[0].tolist() == tokenizer.reference_encode(text)


@pytest.mark.parametrize("piece", [" ", "\n", " \n", "\t"])
def test_very_long_white_space(tokenizer, piece):
    text = "x" + piece * (400_000 // len(piece)) + "x"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch([text])[0].tolist() == tokenizer.encode(text)


def test_slow_path_for_long_white_space_begins_without_a_seam(tokenizer):
    for count in (19_998, 19_999, 20_000, 20_001):
        text = "a" + " " * count + "b"
        assert tokenizer.encode(text) == tokenizer._fast.encode_ordinary(text)


def test_digits_are_grouped_by_two(tokenizer):
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("1234567")]
    assert all(len(piece) <= 2 for piece in pieces)


def test_names_of_special_tokens_are_ordinary_text(tokenizer):
    text = f"before {BOS} and <|assistant_start|> after"
    ids = tokenizer.encode(text)
    assert max(ids) < tokenizer.bos_id
    assert tokenizer.encode_batch([text])[0].max() < tokenizer.bos_id
    assert tokenizer.decode(ids) == text


def test_token_bytes_count_bytes_that_are_no_text_alone(tokenizer):
    lengths = tokenizer.token_bytes
    assert lengths.dtype == np.int32 and lengths.shape == (500,)
    assert (lengths[491:] == 0).all() and (lengths[:491] > 0).all()
    assert (lengths[:256] == 1).all()
    assert sorted(tokenizer._bytes[:256]) == [bytes([b]) for b in range(256)]
    torn = tokenizer.encode("鬱")  # not in the corpus: single bytes
    assert len(torn) == 3 and lengths[torn].sum() == 3
    assert tokenizer.decode(torn[:1]) == "\ufffd"


def test_auto_tokenizer_puts_bos_in_front(tokenizer, automatic):
    text = "  bako mira\n\n 42"
    assert automatic(text).input_ids == [tokenizer.bos_id, *tokenizer.encode(text)]
    assert automatic(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
    assert len(automatic) == tokenizer.vocab_size


def test_auto_tokenizer_decodes_exactly(automatic):
    for text in ["  lead", "a , b . c ! n't  's", "tail \n", "한국 日本", "I 'm  here ."]:
        ids = automatic(text).input_ids
        assert automatic.decode(ids, skip_special_tokens=True) == text
        assert automatic.decode(ids) == BOS + text


def test_auto_tokenizer_settings(tokenizer, automatic):
    bos = tokenizer.bos_id
    assert (automatic.bos_token_id, automatic.pad_token_id, automatic.eos_token_id) == (bos, bos, bos)
    assert automatic.padding_side == "left"
    assert automatic.model_max_length > 10**9  # open until a release sets it
    batch = automatic(["ba", "ba ko mi ra"], padding=True)
    short = automatic("ba").input_ids
    padding = len(batch.input_ids[1]) - len(short)
    assert padding > 0
    assert batch.input_ids[0] == [bos] * padding + short
    assert batch.attention_mask[0] == [0] * padding + [1] * len(short)
    assert set(automatic.all_special_tokens) == set(SPECIAL_TOKENS)


def test_auto_tokenizer_survives_saving_again(automatic, tmp_path):
    automatic.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("  ba ko").input_ids == automatic("  ba ko").input_ids
    assert Tokenizer(tmp_path).encode("  ba ko") == again("  ba ko", add_special_tokens=False).input_ids


def test_export_sets_the_context_length(tokenizer, tmp_path):
    (tmp_path / "release").mkdir()
    export_tokenizer(tokenizer.folder, tmp_path / "release", 2048)
    assert not (tmp_path / "release" / MANIFEST).exists()  # the release's own lists these files
    exported = AutoTokenizer.from_pretrained(tmp_path / "release")
    assert exported.model_max_length == 2048
    assert exported("bako").input_ids == [tokenizer.bos_id, *tokenizer.encode("bako")]
    write_manifest(tmp_path / "release", "release")
    assert load_tokenizer(tmp_path / "release").sha256 == tokenizer.sha256


def test_training_is_deterministic(tmp_path):
    texts = list(fuzz_texts(300))
    first, second = (train_tokenizer(texts, 300, tmp_path / name) for name in "ab")
    assert first.sha256 == second.sha256


def test_training_reads_no_more_than_asked(tmp_path):
    read = []

    def texts():
        for number in range(1000):
            read.append(number)
            yield "ba ko mi ra lu bako bako mira " * 10

    train_tokenizer(texts(), 270, tmp_path / "t", max_bytes=3000)
    assert len(read) == 11


@pytest.mark.parametrize(
    ("size", "words"), [(70_000, "at most 65536"), (200, "too small"), (5000, "corpus is too small .* 2[67]")]
)
def test_sizes_that_cannot_be(size, words, tmp_path):
    with pytest.raises(UserError, match=words):
        train_tokenizer(["ba ko mi ba ko mi"], size, tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


def test_every_file_is_compared_and_the_data_named(tokenizer, tmp_path):
    out = tmp_path / "t"
    texts = ["ba ko mi ra lu bako bako mira " * 10]
    assert train_tokenizer(texts, 268, out, made_from={"data": "1" * 64}).made_from == {"data": "1" * 64}
    for file in out.iterdir():
        data = file.read_bytes()
        for at in (0, len(data) // 2, len(data) - 3):
            file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            with pytest.raises(UserError, match=f"{out}") as caught:
                load_tokenizer(out)
            assert "\n" not in str(caught.value) and "tokenizer train" in str(caught.value)
            (tmp_path / "release").mkdir(exist_ok=True)
            with pytest.raises(UserError, match=f"{out}"):
                export_tokenizer(out, tmp_path / "release", 64)
        file.write_bytes(data)
    assert load_tokenizer(out).vocab_size == 268


def test_files_that_are_no_tokenizer(tokenizer, tmp_path):
    with pytest.raises(UserError, match="not found"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no MANIFEST\.sha256"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="not a byte-level BPE"):
        Tokenizer(tmp_path)
    described = json.loads((tokenizer.folder / "tokenizer.json").read_text())
    described["added_tokens"] = described["added_tokens"][1:]  # no BOS
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="not a byte-level BPE"):
        Tokenizer(tmp_path)


def never_read():
    pytest.fail("text was read before the folder was looked at")
    yield ""


@pytest.mark.parametrize("name", ["thesis.txt", "tokenizer.json"])
def test_a_folder_of_other_things_is_never_replaced(name, tmp_path):
    (tmp_path / name).write_text("years of work")
    with pytest.raises(UserError, match="not a tokenizer folder made by cognica-poe"):
        train_tokenizer(never_read(), 266, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "years of work"


def test_a_tokenizer_of_ours_is_replaced_and_verified(tmp_path):
    for size in (270, 268):
        train_tokenizer(["ba ko mi ra lu bako bako mira " * 10], size, tmp_path / "t")
    assert load_tokenizer(tmp_path / "t").vocab_size == 268
    verify_manifest(tmp_path / "t")
    assert set(Manifest.read(tmp_path / "t").digests) == {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }
