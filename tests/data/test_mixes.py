import pytest

from cognica_poe.data.mixes import FRONTIER_V1, MIXES, load_mix, save_mix, unpinned
from cognica_poe.errors import UserError
from cognica_poe.files import read_json, write_json
from tests.data.corpora import pair_of_sources


def test_frontier_v1_is_the_mix_of_the_card():
    shares = {source.name: source.share for source in MIXES["frontier_v1"].sources}
    assert len(shares) == 11
    assert list(shares.values()) == [0.335, 0.241, 0.157, 0.052, 0.052, 0.042, 0.042, 0.042, 0.021, 0.010, 0.006]
    assert sum(shares.values()) == pytest.approx(1)
    culturax = next(source for source in FRONTIER_V1.sources if source.name == "culturax")
    assert culturax.languages == ("ko", "zh", "ja", "es", "fr")
    assert all(source.licence and source.dataset.count("/") == 1 for source in FRONTIER_V1.sources)


def test_a_pin_is_a_whole_commit():
    assert unpinned(pair_of_sources(revision="main")) == ["web"]
    assert unpinned(pair_of_sources()) == []


def test_bad_mix_files(tmp_path):
    file = tmp_path / "m.json"
    save_mix(pair_of_sources(share=0.5), file)
    with pytest.raises(UserError, match=r"add up to 1, not 0\.75"):
        load_mix(file)
    described = read_json(file)
    described["sources"][0]["colour"] = "blue"
    write_json(file, described)
    with pytest.raises(UserError, match=r"sources\.0\.colour: unexpected"):
        load_mix(file)
    write_json(file, {"name": "x"})
    with pytest.raises(UserError, match="is not a mix"):
        load_mix(file)
