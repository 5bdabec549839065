"""The card comes from records alone, twice the same, and a model's words cannot act in it."""

import copy
import html
import re

import pytest
import yaml
from markdown_it import MarkdownIt

from cognica_poe.analysis.record import AnalysisRecord
from cognica_poe.errors import UserError
from cognica_poe.release.card.markdown import render_card
from cognica_poe.release.report.html import write_report
from cognica_poe.release.text import html_text, markdown_text, visible
from cognica_poe.seals import write_sealed
from tests.release.records import HOSTILE, RELEASE, make_record, make_run

RECORDS = [make_record(step) for step in (0, 100, 300)]


def _tokens(text: str) -> list:
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(text)
    return [child for token in tokens for child in [token, *(token.children or [])]]


def test_same_records_render_the_same_card():
    first = render_card(RECORDS, RELEASE)
    assert render_card(copy.deepcopy(RECORDS[::-1]), copy.deepcopy(RELEASE)) == first


@pytest.mark.parametrize("path", ["pool", "plain"])
def test_the_records_of_these_tests_are_valid_records(path):
    AnalysisRecord.model_validate(make_record(100, path=path))


def test_a_changed_figure_changes_the_card():
    changed = copy.deepcopy(RECORDS)
    changed[1]["bpb"]["stage"][2] += 0.01
    assert render_card(changed, RELEASE) != render_card(RECORDS, RELEASE)


def test_every_measured_number_of_the_card_is_in_the_records():
    shown = set(re.findall(r"\d+\.\d{4}\b", render_card(RECORDS, RELEASE)))
    values: set[str] = set()

    def walk(item):
        if isinstance(item, dict):
            item = list(item.values())
        if isinstance(item, list):
            for part in item:
                walk(part)
        elif isinstance(item, float):
            values.add(f"{abs(item):.4f}")

    walk(RECORDS)
    assert shown - {"10.5281"} <= values  # the paper's DOI is no measurement
    assert len(shown) > 30


def test_front_matter_is_yaml_of_known_fields():
    matter = yaml.safe_load(render_card(RECORDS, RELEASE).split("---\n")[1])
    assert matter["license"] == "apache-2.0"
    assert matter["language"] == ["en"]
    assert matter["library_name"] == "transformers"
    assert "product-of-experts" in matter["tags"]


def test_hostile_name_stays_out_of_the_front_matter_and_the_code_block():
    card = render_card(RECORDS, RELEASE | {"name": "x\n---\nevil: 1", "repo_id": 'a"\n```\n<script>'})
    assert "evil" not in yaml.safe_load(card.split("---\n")[1])
    assert "<script>" not in "".join(token.content for token in _tokens(card) if token.type.startswith("html"))
    assert sum(token.type == "fence" for token in _tokens(card)) == 3


@pytest.mark.parametrize(
    "text", [HOSTILE, "- item", "1. item", "=== x", "www.evil.example", "a@b.c", "$x$ ~~y~~ :smile:"]
)
def test_what_a_model_wrote_is_shown_as_text_only(text):
    tokens = _tokens(f"| a |\n| :--- |\n| {markdown_text(text)} |\n\n{markdown_text(text)}\n")
    kinds = {token.type for token in tokens}
    assert kinds <= {"inline", "text", "paragraph_open", "paragraph_close"} | {
        k for k in kinds if k[:2] in ("ta", "th", "tr", "td", "tb")
    }
    rows = sum(token.type == "tr_open" for token in tokens)
    assert rows == 2
    assert visible(text).strip() in "".join(t.content for t in tokens if t.type == "text").replace("&nbsp;", "")


def test_hidden_characters_are_spelled_out_and_long_text_is_cut():
    shown = visible("a\u202eb\x1b[31m\u200b" + "x" * 500, limit=40)
    assert "\u202e" not in shown and "U+202E" in shown and "U+001B" in shown and "U+200B" in shown
    assert shown.endswith(" …") and len(shown) < 80
    assert html_text('<a href="x">') == "&lt;a href=&quot;x&quot;&gt;"


@pytest.mark.parametrize(
    "unit, sampled, said",
    [
        ("document", False, "210 documents held out whole"),
        ("document", True, "a sample of 210 documents held out from training, long ones cut"),
        ("piece", False, "210 pieces of documents held out from training"),
        ("piece", True, "210 pieces of a sample of documents held out from training"),
    ],
)
def test_the_validation_text_is_called_what_it_is(tmp_path, unit, sampled, said):
    record = make_record(300)
    record["validation"] |= {"unit": unit, "sampled": sampled}
    for text in _texts(tmp_path, record):
        assert f"Validation: {said}, 1,000,000 bytes" in text


def _texts(folder, record) -> tuple[str, str]:
    """Card and report of one record."""
    run = make_run(folder / "run")
    write_sealed(run / "analysis" / "step-300.json", record)
    return render_card([record], RELEASE), html.unescape(write_report([run], folder / "page.html").read_text())


def test_every_path_is_shown_with_its_interval_and_accuracy(tmp_path):
    record = make_record(300)
    record["intervals"]["prefix"][1] = [1.1234, 2.2345]
    record["accuracy"]["prefix"][1] = 0.123456
    card, page = _texts(tmp_path, record)
    row = next(line for line in card.splitlines() if line.startswith("| first 2 stages"))
    assert "[1.1234, 2.2345]" in row and "12.35 %" in row and "\u2013" not in row
    assert "[1.1234, 2.2345]" in page and "12.35 %" in page


def test_the_capability_table_has_every_step_and_says_what_it_is_worth(tmp_path):
    card = render_card(RECORDS, RELEASE)
    section = card[card.index("## Capabilities") : card.index("## Probes at step 300")]
    assert "3 prompts are an anecdote, not a benchmark" in section
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in section.splitlines()
            if line[:2] == "| "]  # fmt: skip
    assert rows[0] == ["step", "1", "2", "3", "atomic number 79"]
    for place, probe in enumerate(RECORDS[0]["probes"], start=1):
        assert f"\n{place}. {probe['prompt']}\n" in section
    wrong = r"wrong: Ag\|\<b>"
    assert rows[2:] == [
        [str(step), "none (no answer)", "right: cold", wrong, "yes" if step > 100 else "no"] for step in (0, 100, 300)
    ]
    page = write_report([make_run(tmp_path / "run")], tmp_path / "page.html").read_text()
    assert "3 prompts are an anecdote" in page and "right: cold" in page and "wrong: Ag|&lt;b&gt;" in page
    seven = copy.deepcopy(RECORDS[0])
    seven["probes"] = [{**seven["probes"][1], "prompt": f"p{index}"} for index in range(7)]
    assert "Seven prompts are an anecdote" in render_card([seven], RELEASE)


def test_bytes_of_a_source_are_those_of_training(tmp_path):
    sources = [{"name": "docs", "documents": 10, "bytes": 9_000, "val_documents": 1, "val_bytes": 2_000}]
    card = render_card(RECORDS, RELEASE | {"data": {"sources": sources}})
    header, _, row = card[card.index("| name") :].splitlines()[:3]
    cells = {name.strip(): cell.strip() for name, cell in zip(header.split("|"), row.split("|"), strict=True)}
    assert cells["training bytes"] == "7,000" and cells["validation bytes"] == "2,000"
    page = write_report([make_run(tmp_path / "run")], tmp_path / "page.html").read_text()
    assert "<td>810</td>" in page and "<td>90</td>" in page  # of 900 bytes, 90 held out


def test_loading_code_lets_the_configuration_run(tmp_path):
    """Without it transformers asks on the terminal, and waits, before it reads the tokenizer."""
    page = html.unescape(write_report([make_run(tmp_path / "run")], tmp_path / "page.html").read_text())
    for text in (render_card(RECORDS, RELEASE), page):
        calls = re.findall(r"Auto\w+\.from_pretrained\((.*)\)", text)
        assert len(calls) >= 2 and all("trust_remote_code=True" in call for call in calls)


def test_card_of_a_backprop_arm_names_its_path():
    card = render_card([make_record(300, path="plain")], RELEASE)
    assert "| **plain path**" in card and "**full pool**" not in card
    assert "generate_wand" not in card and "product-of-experts" not in card and "stage 0" not in card


def test_card_needs_records_and_one_per_step():
    with pytest.raises(UserError, match="no analysis record"):
        render_card([], RELEASE)
    with pytest.raises(UserError, match="two analysis records"):
        render_card([RECORDS[0], RECORDS[0]], RELEASE)


def test_card_survives_missing_optional_parts():
    bare = {key: make_record(5)[key] for key in ("step", "model", "bpb")}
    assert "## Measurements at step 5" in render_card([bare], {"name": "bare"})


def test_a_card_of_one_step_promises_no_file_that_its_folder_lacks():
    alone, several = render_card(RECORDS[-1:], RELEASE), render_card(RECORDS, RELEASE)
    said = "generated from `analysis.json`, `release.json`, `config.json` and `trajectory.jsonl`"
    assert f"{said} of this revision; no figure" in alone and f"{said} of every revision; no figure" in several
