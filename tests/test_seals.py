"""Sealed JSON, sealed lines and files compared once: every changed byte of the content is told."""

import json
import os

import pytest

from cognica_poe.errors import UserError
from cognica_poe.files import Manifest, read_json, sha256_file
from cognica_poe.seals import open_line, read_sealed, require_sha256, sealed, sealed_line, write_sealed

CONTENT = {"step": 7, "loss": 0.1 + 0.2, "parts": {"b": [1, 2.5, None, True], "a": "é\n"}, "none": None}


def refusal(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_content_comes_back_without_the_seal(tmp_path):
    write_sealed(tmp_path / "a.json", CONTENT)
    assert read_sealed(tmp_path / "a.json", "record", "make it again") == CONTENT
    assert sealed(sealed(CONTENT)) == sealed(CONTENT)


def test_every_changed_byte_is_told_or_changes_nothing(tmp_path):
    file, told, harmless = tmp_path / "a.json", 0, 0
    write_sealed(file, CONTENT)
    data = file.read_bytes()
    for at in range(len(data)):
        for bit in range(8):
            file.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
            try:
                assert read_sealed(file, "record", "make it again") == CONTENT
                harmless += 1
            except UserError as error:
                assert str(file) in str(error) and "\n" not in str(error)
                told += 1
    print(f"sealed JSON: {8 * len(data)} bits flipped, {told} told, {harmless} of no effect")
    assert told > 20 * harmless


def test_what_is_not_sealed_is_refused(tmp_path):
    file = tmp_path / "a.json"
    for text, words in (("{}", "carries no sha256"), ("[]", "no JSON object"), ("{", "not valid JSON")):
        file.write_text(text)
        assert words in refusal(read_sealed, file, "record", "make it again")
    write_sealed(file, CONTENT)
    file.write_text(json.dumps({**read_json(file), "step": 8}))
    message = refusal(read_sealed, file, "record", "make it again")
    assert "was changed after it was written" in message and message.endswith("; make it again")


def test_every_changed_byte_of_a_line_is_told_or_changes_nothing():
    line = sealed_line(CONTENT).encode()
    assert open_line(line) == CONTENT and open_line(sealed_line({}).encode()) == {}
    for at in range(len(line)):
        for bit in range(8):
            try:
                assert open_line(line[:at] + bytes([line[at] ^ 1 << bit]) + line[at + 1 :]) == CONTENT
            except ValueError as error:
                assert "\n" not in str(error)


def test_a_file_is_read_again_only_when_it_has_changed(tmp_path, monkeypatch):
    file, reads = tmp_path / "shard", []
    file.write_bytes(b"whole")
    digest = sha256_file(file)
    monkeypatch.setattr("cognica_poe.seals.sha256_file", lambda path: reads.append(path) or sha256_file(path))
    for _ in range(3):
        require_sha256(file, digest, "shard", "build it again")
    assert reads == [file]
    file.write_bytes(b"whale")
    os.utime(file, ns=(1, 1))
    message = refusal(require_sha256, file, digest, "shard", "build it again")
    assert f"shard {file} is corrupt" in message and digest[:12] in message and sha256_file(file)[:12] in message
    refusal(require_sha256, file, digest, "shard", "build it again")
    assert len(reads) == 2
    file.unlink()
    assert "is missing" in refusal(require_sha256, file, digest, "shard", "build it again")


def test_a_manifest_says_what_its_folder_was_made_from():
    manifest = Manifest("tokenizer", {"a": "0" * 64}, {"data": "1" * 64, "recipe": "2" * 64})
    lines = manifest.data().decode().splitlines()
    assert lines[1:3] == [f"# made from data {'1' * 64}", f"# made from recipe {'2' * 64}"]
    assert Manifest.parse(manifest.data(), "there") == manifest


def test_every_changed_byte_of_a_manifest_is_told():
    data = Manifest("release", {"a": "0" * 64, "b": "f" * 64}, {"data": "1" * 64}).data()
    for at in range(len(data)):
        for bit in range(8):
            assert "there is corrupt" in refusal(
                Manifest.parse, data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :], "there"
            )
    assert "its last line is not the sha256" in refusal(Manifest.parse, data[: data.rfind(b"#")], "there")
