import json
from dataclasses import replace

import pytest

from cognica_poe.cli.main import main
from cognica_poe.data import tokens
from cognica_poe.data.documents import Document
from cognica_poe.data.manifest import read_documents
from cognica_poe.data.tokens import measure, summary, with_measured
from cognica_poe.errors import UserError
from tests.data.corpora import pair_of_sources, texts


def documents():
    web = [Document(text, "web", "en", f"w{i}") for i, text in enumerate(texts(30, seed=1))]
    chats = [Document(f"User: {t}", "chats", ("ko", "ja")[i % 2], f"c{i}") for i, t in enumerate(texts(9, seed=2))]
    return [*web, *chats]


def test_counts_are_those_of_every_document(tokenizer):
    found = {(tally.source, tally.language): tally for tally in measure(documents(), tokenizer, 10**9)}
    assert set(found) == {("web", "en"), ("chats", "ko"), ("chats", "ja")}
    web = [document.text for document in documents() if document.source == "web"]
    tally = found["web", "en"]
    ids = [tokenizer.encode(text) for text in web]
    assert (tally.documents, tally.bytes) == (30, sum(len(text.encode()) for text in web))
    assert tally.tokens == sum(map(len, ids)) and tally.changed == 0
    assert tally.uses.tolist() == [sum(row.count(i) for row in ids) for i in range(tokenizer.vocab_size)]
    assert tally.bytes_per_token == tally.bytes / tally.tokens and tally.fertility == tally.tokens / tally.words
    assert 0 < tally.byte_tokens < 1


def test_threads_change_nothing(tokenizer):
    one, three = (summary(measure(documents(), tokenizer, 10**9, n), tokenizer) for n in (1, 3))
    assert one == three
    batch = [document.text for document in documents()]
    for a, b in zip(tokenizer.encode_batch(batch), tokenizer.encode_batch(batch, threads=3), strict=True):
        assert a.tolist() == b.tolist() and a.dtype == b.dtype


def test_the_summary_adds_up(tokenizer):
    said = summary(measure(documents(), tokenizer, 10**9), tokenizer)
    assert [row["source"] for row in said["sources"]] == ["web", "chats"]
    assert said["sources"][1]["language"] == "ja, ko" and said["sources"][1]["documents"] == 9
    for rows in (said["sources"], said["rows"]):
        assert sum(row["share_of_tokens"] for row in rows) == pytest.approx(1)
    used = {i for document in documents() for i in tokenizer.encode(document.text)}
    special = set(tokenizer.special_ids.values())
    assert set(said["unused"]) == set(range(tokenizer.vocab_size)) - used - special
    assert summary([], tokenizer)["rows"] == [] == summary([], tokenizer)["sources"]


def test_a_text_that_decoding_changes_is_counted(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, ids: "other")
    assert sum(tally.changed for tally in measure(documents(), tokenizer, 10**9)) == 39


def test_no_more_is_read_than_asked(tokenizer):
    assert sum(tally.documents for tally in measure(documents(), tokenizer, 1)) == 1
    assert sum(tally.bytes for tally in measure(documents(), tokenizer, 2000)) < 3000


def test_the_command_prints_draws_and_corrects_a_mix(data_dir, tokenizer, tmp_path, capsys):
    main(
        ["tokenizer", "report", str(data_dir), "--tokenizer", str(tokenizer.folder), "--plot", str(tmp_path / "p.svg")]
    )
    shown = capsys.readouterr().out
    assert "tales" in shown and "tokens occur nowhere in it" in shown
    assert "tales (en)" in (tmp_path / "p.svg").read_text() or (tmp_path / "p.svg").stat().st_size > 5000
    main(["tokenizer", "report", str(data_dir), "--tokenizer", str(tokenizer.folder), "--json"])
    (tmp_path / "report.json").write_text(capsys.readouterr().out)
    said = json.loads((tmp_path / "report.json").read_text())
    assert sum(row["documents"] for row in said["rows"]) == sum(1 for _ in read_documents(data_dir, "train"))
    mix = pair_of_sources(name="tales")
    mix = replace(mix, sources=(mix.sources[0], replace(mix.sources[1], name="notes")))
    measured = {row["source"]: row["bytes_per_token"] for row in said["sources"]}
    corrected = with_measured(mix, tmp_path / "report.json")
    assert {s.name: s.bytes_per_token for s in corrected.sources} == pytest.approx(measured, abs=1e-4)
    with pytest.raises(UserError, match="has no bytes per token of web, chats"):
        with_measured(pair_of_sources(), tmp_path / "report.json")
    (tmp_path / "no.json").write_text('{"sources": [3]}')
    with pytest.raises(UserError, match="is no report of tokens"):
        with_measured(mix, tmp_path / "no.json")


def test_a_plot_needs_a_place(data_dir, tokenizer, tmp_path, capsys):
    for place in (tmp_path / "p.txt", tmp_path / "no" / "p.png", tmp_path):
        with pytest.raises(SystemExit):
            main(["tokenizer", "report", str(data_dir), "--tokenizer", str(tokenizer.folder), "--plot", str(place)])
        assert "--plot" in capsys.readouterr().err


def test_the_plot_has_a_bar_for_every_row(tokenizer, tmp_path, monkeypatch):
    import matplotlib.axes

    drawn = []
    real = matplotlib.axes.Axes.barh
    monkeypatch.setattr(
        matplotlib.axes.Axes, "barh", lambda self, y, w, **k: (drawn.append((y, w)), real(self, y, w, **k))[1]
    )
    said = summary(measure(documents(), tokenizer, 10**9), tokenizer)
    tokens.plot(said, tmp_path / "p.png")
    assert [len(width) for _, width in drawn] == [3, 3] and drawn[0][0][-1] == "web (en)"
    assert drawn[0][1][-1] == said["rows"][0]["bytes_per_token"]
