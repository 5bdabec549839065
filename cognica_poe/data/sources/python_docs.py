"""The embedded corpus ``python-docs``: text that every Python installation already has, read where it lies.

Four sources: ``pydoc`` (the language reference topics of ``help()``), ``docstrings`` (what the modules, classes and
functions of the standard library say about themselves), ``library`` (its code) and ``packages`` (descriptions of the
installed packages). Nothing is downloaded, nothing is bundled, no module is imported: sources are parsed as text.

Every text appears once. The docstrings of a file are taken out of its code, and both halves share a group, so that
they stay on one side of the validation split.
"""

from __future__ import annotations

import ast
import os
import re
import sys
import sysconfig
import tokenize
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, cast

from cognica_poe.data.documents import Document, text_problem
from cognica_poe.errors import UserError

if TYPE_CHECKING:
    from email.message import Message

LICENCES = {  # by source
    "pydoc": "PSF-2.0",
    "docstrings": "PSF-2.0",
    "library": "PSF-2.0",
    "packages": "each package's own, named in its metadata",
}
_SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "pydoc_data"),
    *("turtledemo", "ensurepip", "distutils", "tkinter", "__phello__", "__pycache__"),
}
_SKIPPED_FILES = re.compile(r"_sysconfigdata.*|__hello__|token|keyword|symbol|stringprep|entities|.*_d")
_TOO_REPETITIVE = 0.16  # compressed share below which a file is a table or boilerplate
_SHORTEST = 200  # bytes; below this a file holds little but an import
_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def collect() -> Iterator[Document]:
    """All documents in a fixed order. Raises UserError where the standard library's source files are missing."""
    library = Path(sysconfig.get_paths()["stdlib"])
    count = 0
    for document in _stdlib_documents(library):
        count += 1
        yield document
    if not count:
        raise UserError(
            f"no library source files found in {library}: this Python ships without them; "
            "use another Python, or build the data from a folder of your own texts"
        )
    yield from _topic_documents(library)
    yield from _package_documents()


def _prefix() -> str:
    return f"python{sys.version_info.major}.{sys.version_info.minor}"


def _usable(text: str) -> bool:
    return len(text.encode("utf-8", "replace")) >= _SHORTEST and text_problem(text) is None


def _library_files(library: Path) -> Iterator[PurePosixPath]:
    for folder, folders, files in os.walk(library):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith("config-"))
        for name in sorted(files):
            path = PurePosixPath(Path(folder, name).relative_to(library).as_posix())
            if path.suffix == ".py" and not _SKIPPED_FILES.fullmatch(path.stem):
                yield path


def _stdlib_documents(library: Path) -> Iterator[Document]:
    for path in _library_files(library):
        origin = f"{_prefix()}/Lib/{path}"
        try:
            with tokenize.open(library / path) as file:  # honours the coding cookie, as the interpreter does
                source = file.read()
            code, documentation = split_docstrings(source, path)
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue  # deliberately broken or unreadable files are no text for anybody
        if len(zlib.compress(source.encode())) < _TOO_REPETITIVE * len(source.encode()):
            continue
        if _usable(code):
            yield Document(code, "library", "code", origin, origin)
        if _usable(documentation):
            yield Document(documentation, "docstrings", "en", f"{origin}#docstrings", origin)


def _topic_documents(library: Path) -> Iterator[Document]:
    file = library / "pydoc_data" / "topics.py"
    if not file.is_file():
        return  # some distributions leave it out
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assignment = next(node for node in tree.body if isinstance(node, ast.Assign))
    topics: dict[str, str] = ast.literal_eval(assignment.value)
    for name in sorted(topics):
        text = topics[name].rstrip() + "\n"
        if _usable(text):
            yield Document(text, "pydoc", "en", f"{_prefix()}/Lib/pydoc_data/topics.py#{name}")


def _package_documents() -> Iterator[Document]:
    from importlib import metadata

    found: dict[str, Document] = {}
    for distribution in metadata.distributions():
        about = cast("Message", distribution.metadata)  # what it is; the annotation promises less
        name, version = about.get("Name"), about.get("Version")
        text = str(about.get_payload() or about.get("Description") or "")
        text = text.replace("\r\n", "\n").replace("\r", "\n").strip() + "\n"
        if not name or name.lower().replace("_", "-") == "cognica-poe" or not _usable(text):
            continue
        origin = f"packages/{name}-{version}/METADATA"
        found.setdefault(name.lower(), Document(text, "packages", "en", origin))
    yield from (found[name] for name in sorted(found))


def split_docstrings(source: str, path: PurePosixPath) -> tuple[str, str]:
    """Part a module into its code without docstrings and a text of its docstrings, each under its signature.

    A docstring that is the whole body of a function or class stays in the code (which would not compile without it)
    and is left out of the text. Raises SyntaxError if ``source`` does not parse.
    """
    tree = ast.parse(source)
    lines = [line + "\n" for line in source.split("\n")]  # as the parser counts; splitlines also cuts at form feeds
    dropped: set[int] = set()
    sections = [_module_name(path)]
    for node, name in _walk(tree, ""):
        if not ast.get_docstring(node, clean=False):
            continue
        statement = node.body[0]
        last_line = statement.end_lineno or statement.lineno
        before = lines[statement.lineno - 1].encode()[: statement.col_offset]
        after = lines[last_line - 1].encode()[statement.end_col_offset :]
        if before.strip() or after.strip() or (len(node.body) == 1 and not isinstance(node, ast.Module)):
            continue
        dropped.update(range(statement.lineno, last_line + 1))
        text = (ast.get_docstring(node) or "").strip()
        sections.append(text if isinstance(node, ast.Module) else f"{_signature(node, name)}\n{_indent(text)}")
    if len(sections) == 1:
        return source, ""
    code = "".join(line for number, line in enumerate(lines, 1) if number not in dropped)
    return code.strip("\n") + "\n", "\n\n".join(section for section in sections if section) + "\n"


def _walk(node: ast.AST, prefix: str) -> Iterator[tuple[ast.Module | _Definition, str]]:
    """Module, classes and functions in the order of the file, with their dotted names."""
    if isinstance(node, ast.Module | _Definition):
        yield node, prefix
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Definition):
            yield from _walk(child, f"{prefix}.{child.name}" if prefix else child.name)
        elif isinstance(child, ast.If | ast.Try | ast.With):
            yield from _walk(child, prefix)


def _module_name(path: PurePosixPath) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _signature(node: _Definition, name: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {name}({bases})" if bases else f"class {name}"
    return f"{name}({ast.unparse(node.args)})"


def _indent(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())
