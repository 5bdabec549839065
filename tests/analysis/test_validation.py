import hashlib

import pytest

from cognica_poe.analysis.validation import document_slice, validation_slice
from cognica_poe.data.documents import Document
from cognica_poe.errors import UserError


def test_slice_takes_everything_that_fits():
    texts = [f"document {index} é" for index in range(20)]
    part = validation_slice([*texts, ""], max_bytes=1_000_000)
    assert part == validation_slice(texts) and part.texts == texts
    assert (part.unit, part.sampled, part.bytes) == ("document", False, sum(len(text.encode()) for text in texts))
    assert part.sha256 != validation_slice(texts[::-1]).sha256


def test_slice_samples_by_hash_and_cuts_long_documents():
    texts = [f"{index} é" * (3 + index % 700) for index in range(400)]
    part = validation_slice(texts, max_bytes=100_000)
    hashed = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    expected, left = [], 100_000
    for text in hashed:
        data = text.encode()[: min(100_000 // 32, left)]
        if left > 0:
            expected.append(data.decode(errors="ignore"))
            left -= len(data)
    assert part.texts == [text for text in expected if text] and part.sampled
    assert 99_800 <= part.bytes <= 100_000
    assert validation_slice(reversed(texts), max_bytes=100_000) == part  # the order of the shards does not matter


def test_few_documents_are_cut_into_pieces():
    text = "".join(f"line {index}\n" for index in range(500))
    part = validation_slice([text])
    assert part.unit == "piece" and 8 <= len(part.texts) <= 20 and "".join(part.texts) == text
    assert all(piece.endswith("\n") for piece in part.texts)
    assert "".join(validation_slice(["x" * 1000]).texts) == "x" * 1000


def test_no_validation_text_is_a_users_mistake():
    with pytest.raises(UserError, match="no document"):
        validation_slice([""])
    with pytest.raises(UserError, match="single short document"):
        validation_slice(["x"])


def _document(text: str, origin: str) -> Document:
    return Document(text, "source", "en", origin)


def test_documents_that_were_cut_from_one_file_belong_together():
    origins = [f"lib/{index // 2}.py" + ("#docstrings" if index % 2 else "") for index in range(20)]
    documents = [_document(f"{index:02d}: text of a file", origin) for index, origin in enumerate(origins)]
    part = document_slice(documents)
    assert part == validation_slice([document.text for document in documents]) and part.unit == "document"
    assert part.units.tolist() == [index // 2 for index in range(20)]
    sampled = document_slice(documents, 200)  # in another order, fewer
    by_text = {document.text: origin.partition("#")[0] for document, origin in zip(documents, origins, strict=True)}
    files = [next(file for text, file in by_text.items() if text.startswith(some)) for some in sampled.texts]
    numbers = list(dict.fromkeys(files))
    assert sampled.sampled and 8 <= len(numbers) < len(files)
    assert sampled.units.tolist() == [numbers.index(file) for file in files]


def test_rows_and_few_files_are_units_of_their_own():
    rows = [_document(f"row {index}", f"rows.jsonl#{index}") for index in range(12)]
    assert document_slice(rows).owners == () and document_slice(rows).units.tolist() == list(range(12))
    topics = [_document(f"topic {index}", f"topics.py#topic{index}") for index in range(12)]
    assert document_slice(topics).owners == ()  # a single file: nothing to draw from
    assert document_slice([*rows, *topics]).units.tolist() == [*range(12), *[12] * 12]
