import ast
import sys
from pathlib import PurePosixPath

import pytest

from cognica_poe.data.documents import text_problem
from cognica_poe.data.sources import python_docs
from cognica_poe.data.sources.python_docs import collect, split_docstrings
from cognica_poe.errors import UserError

MODULE = '''"""Module says hello."""

import os


class Box(dict):
    """A box.

    Holds things.
    """

    size = 3

    def put(self, thing, *, at=None):
        """Put a thing."""
        return thing

    def nothing(self):
        """The docstring is all there is."""


def one_line(): """Stays."""; return 1


if os:
    async def late(a: int = 1) -> int:
        """Defined late."""
        return """not a docstring"""
'''


@pytest.fixture(scope="module")
def documents():
    return list(collect())


def test_docstrings_leave_the_code():
    code, documentation = split_docstrings(MODULE, PurePosixPath("box/__init__.py"))
    for text in ("Module says hello", "A box.", "Put a thing", "Defined late"):
        assert text not in code and text in documentation
    for text in ("The docstring is all there is", "Stays.", "not a docstring"):
        assert text in code and text not in documentation
    assert documentation.startswith("box\n\nModule says hello.\n\nclass Box(dict)\n    A box.\n\n    Holds things.\n")
    assert "Box.put(self, thing, *, at=None)\n    Put a thing.\n" in documentation
    assert "late(a: int=1)\n" in documentation


def test_the_code_without_docstrings_is_the_same_code():
    code, _ = split_docstrings(MODULE, PurePosixPath("box.py"))
    original, stripped = ast.parse(MODULE), ast.parse(code)
    assert _without_docstrings(original) == _without_docstrings(stripped)


def _without_docstrings(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            has_one = ast.get_docstring(node) is not None
            node.body = node.body[1:] if has_one and len(node.body) > 1 else node.body
    return ast.dump(tree)


def test_a_form_feed_does_not_shift_the_lines():
    code, documentation = split_docstrings(
        'x = 1\n\x0c\ndef f():\n    """Say."""\n    return 2\n', PurePosixPath("m.py")
    )
    assert code == "x = 1\n\x0c\ndef f():\n    return 2\n"
    assert documentation == "m\n\nf()\n    Say.\n"


def test_a_file_without_docstrings_is_left_alone():
    assert split_docstrings("x = 1\n", PurePosixPath("m.py")) == ("x = 1\n", "")


def test_the_collected_corpus(documents):
    sizes = {name: 0 for name in ("library", "docstrings", "packages", "pydoc")}
    for document in documents:
        sizes[document.source] += len(document.text.encode())
        assert text_problem(document.text) is None
        assert not document.origin.startswith("/") and ".." not in document.origin and "\\" not in document.origin
        assert "site-packages" not in document.origin and "/test/" not in document.origin
    assert 4e6 < sum(sizes.values()) < 15e6
    assert sizes["library"] > 2e6 and sizes["docstrings"] > 5e5 and sizes["packages"] > 1e5
    assert len({document.origin for document in documents}) == len(documents)


def test_both_halves_of_a_file_share_a_group(documents):
    code = next(d for d in documents if d.origin.endswith("Lib/json/decoder.py"))
    words = next(d for d in documents if d.origin.endswith("Lib/json/decoder.py#docstrings"))
    assert code.group_key == words.group_key == code.origin
    assert "Simple JSON <https://json.org> decoder" in words.text
    assert "Simple JSON <https://json.org> decoder" not in code.text


def test_all_code_still_compiles(documents):
    for document in documents:
        if document.source == "library":
            ast.parse(document.text)


def test_collecting_is_deterministic_and_imports_nothing_that_it_reads(documents):
    before = set(sys.modules)
    assert list(collect()) == documents
    assert not {"antigravity", "this", "pydoc_data.topics", "turtle"} & (set(sys.modules) - before)


def test_a_python_without_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(python_docs.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match="no library source files"):
        list(collect())
