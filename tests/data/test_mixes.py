import re
from dataclasses import replace

import pytest

from cognica_poe.data.mixes import (
    FRONTIER_V1,
    MIXES,
    PinnedFile,
    byte_shares,
    choose_files,
    load_mix,
    save_mix,
    text_sizes,
    unpinned,
)
from cognica_poe.errors import UserError
from cognica_poe.files import read_json, write_json
from tests.data.corpora import pair_of_sources

FILES = tuple(PinnedFile(f"data/train-{i}.parquet", 1000 * (i + 1), f"{i:064x}") for i in range(8))


def pinned_pair(**changes):
    mix = pair_of_sources(pinned=FILES, **changes)
    chats = replace(mix.sources[1], pinned=(PinnedFile("a.jsonl", 5, "0" * 64),))
    return replace(mix, sources=(mix.sources[0], chats))


def test_frontier_v1_is_the_mix_of_the_card():
    shares = {source.name: source.share for source in MIXES["frontier_v1"].sources}
    assert len(shares) == 11
    assert list(shares.values()) == [0.335, 0.241, 0.157, 0.052, 0.052, 0.042, 0.042, 0.042, 0.021, 0.010, 0.006]
    assert sum(shares.values()) == pytest.approx(1)
    culturax = next(source for source in FRONTIER_V1.sources if source.name == "culturax")
    assert culturax.languages == ("ko", "zh", "ja", "es", "fr") and culturax.language("ja") == "ja"
    assert all(source.licence and source.dataset.count("/") == 1 for source in FRONTIER_V1.sources)


def test_sizes_follow_shares_of_tokens():
    mix = pair_of_sources(bytes_per_token=4.0)
    mix = replace(mix, sources=(mix.sources[0], replace(mix.sources[1], bytes_per_token=2.0)))
    assert text_sizes(mix, tokens=1000) == {"web": 3000, "chats": 500}
    assert text_sizes(mix, max_bytes=700) == {"web": 600, "chats": 100}
    assert sum(byte_shares(mix).values()) == pytest.approx(1)
    assert text_sizes(replace(mix, bytes=7000)) == {"web": 6000, "chats": 1000}
    with pytest.raises(UserError, match="needs a size: pass --max-bytes"):
        text_sizes(mix)


def test_files_are_chosen_in_an_order_of_their_own():
    source = pinned_pair().sources[0]
    everything = choose_files(source, 10**9)
    assert set(everything) == set(FILES) and everything != list(FILES)
    for wanted in (1, 3000, 20_000):
        chosen = choose_files(source, wanted)
        assert chosen == everything[: len(chosen)]
        assert sum(map(source.text_bytes, chosen)) >= 1.1 * wanted > sum(map(source.text_bytes, chosen[:-1]))
    assert len(choose_files(replace(source, text_per_byte=9.0), 3000)) == 1


def test_a_pin_is_a_whole_commit_with_its_files():
    assert unpinned(pinned_pair(revision="main")) == ["web"]
    assert unpinned(pair_of_sources()) == ["web", "chats"]
    assert unpinned(pinned_pair()) == []


def test_a_mix_file_holds_everything(tmp_path):
    for mix in (FRONTIER_V1, replace(pinned_pair(text_per_byte=2.5), bytes=10**9)):
        save_mix(mix, tmp_path / "m.json")
        assert load_mix(tmp_path / "m.json") == mix


MISTAKES = {
    "add up to 1, not 0.75": {"share": 0.5},
    "two sources have the same name": {"name": "chats"},
    "dataset 'web' must read org/name": {"dataset": "web"},
    "configs must name": {"configs": ()},
    "each once": {"configs": ("a", "a")},
    "languages must be one": {"languages": ("en", "fr")},
    "files must hold {config}": {"configs": ("a", "b")},
    "no other braces": {"files": "{x}/*"},
    "text_column and files": {"text_column": ""},
    "bytes_per_token is 0": {"bytes_per_token": 0.0},
    "text_per_byte is 1e+99": {"text_per_byte": 1e99},
    "size of at least 0 and a sha256": {"pinned": (PinnedFile("a.parquet", 5, "0" * 63),)},
    "cannot be read: supported are": {"pinned": (PinnedFile("a.csv", 5, "0" * 64),)},
    "cannot be used as a name": {"pinned": (PinnedFile("../../a.parquet", 5, "0" * 64),)},
    "names config 'b'": {"pinned": (PinnedFile("a.parquet", 5, "0" * 64, "b"),)},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_bad_mix_files(message, tmp_path):
    save_mix(pair_of_sources(**MISTAKES[message]), tmp_path / "m.json")
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        load_mix(tmp_path / "m.json")
    assert "\n" not in str(refused.value)


def test_files_that_are_no_mix(tmp_path):
    file = tmp_path / "m.json"
    save_mix(pair_of_sources(), file)
    described = read_json(file)
    described["sources"][0]["colour"] = "blue"
    write_json(file, described)
    with pytest.raises(UserError, match=r"sources\.0\.colour: unexpected"):
        load_mix(file)
    write_json(file, {"name": "x"})
    with pytest.raises(UserError, match="is not a mix"):
        load_mix(file)
    save_mix(replace(pair_of_sources(), bytes=0), file)
    with pytest.raises(UserError, match="bytes is 0"):
        load_mix(file)
