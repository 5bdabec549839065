import lzma
import random

import pytest

from cognica_poe.analysis.baseline import xz_baseline
from cognica_poe.data.build import build
from cognica_poe.data.manifest import load_manifest, read_documents
from cognica_poe.errors import UserError


def words(seed, count=4000):
    rng = random.Random(seed)
    return " ".join("".join(rng.choice("abcdefgh") for _ in range(rng.randint(2, 7))) for _ in range(count))


def test_it_is_what_xz_gives():
    text = words(1)
    result = xz_baseline([words(2)], [text])
    container = len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    assert result["val_bytes"] == len(text)
    assert result["xz_bpb"] == pytest.approx(8 * container / len(text), rel=0.01)  # but for the container's header


def test_unrelated_training_text_does_not_help_and_a_copy_does_all():
    held = words(1)
    unrelated = xz_baseline([words(2)], [held])
    copied = xz_baseline([words(2), held, words(3)], [held])
    assert unrelated["xz_primed_bpb"] == pytest.approx(unrelated["xz_bpb"], rel=0.1)
    assert copied["xz_primed_bpb"] < 0.05
    assert copied["xz_bpb"] == unrelated["xz_bpb"]


def test_the_window_spans_all_of_the_training_text():
    held = words(1, 3000)
    far = [held, *(words(seed, 40_000) for seed in range(2, 8))]  # the copy is at the far end, over a megabyte away
    assert xz_baseline(far, [held])["xz_primed_bpb"] < 0.05


def test_bytes_are_counted_not_characters():
    text = "日本語の文章です。" * 5
    result = xz_baseline(["x"], [text, text])
    assert result["val_bytes"] == 2 * len(text.encode())


def test_long_training_text_is_cut_at_its_front_and_says_so():
    held = words(1, 1000)
    near = xz_baseline([words(2), held], [held], max_priming_bytes=len(held) + 10)
    far = xz_baseline([held, words(2)], [held], max_priming_bytes=len(held) + 10)
    assert near["train_truncated"] and far["train_truncated"]
    assert near["train_bytes"] == far["train_bytes"] == len(held) + 10
    assert near["xz_primed_bpb"] < 0.1 < 1 < far["xz_primed_bpb"]
    assert not xz_baseline([held], [held], max_priming_bytes=len(held))["train_truncated"]


def test_of_a_data_folder(tmp_path):
    for number in range(40):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number}.txt").write_text(words(number, 200))
    build(tmp_path / "in", tmp_path / "data", val_fraction=0.2, val_min_bytes=100)
    train, val = ([d.text for d in read_documents(tmp_path / "data", split)] for split in ("train", "val"))
    result = xz_baseline(train, val)
    assert result["val_bytes"] == load_manifest(tmp_path / "data").splits["val"].bytes
    assert 2 < result["xz_primed_bpb"] <= result["xz_bpb"] + 0.1 < 5


def test_no_validation_text():
    with pytest.raises(UserError, match="no validation text"):
        xz_baseline(["x"], [])
