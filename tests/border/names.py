"""Names that must never become a path, whatever file they come from."""

HOSTILE = [
    "", ".", "..", "../x", "../../escaped", "a/../../x", "/etc/passwd", "//x", "a//b", "a/", "./a", "a/.", "a\\b",
    "..\\x", "C:", "C:x", "c:/x", "nul\0byte", "line\nbreak", "tab\t", "cr\r", "\x7f", "\x85", "\u2028", "\u202etxt",
    "\ud800", "x" * 256, "é" * 128, None, 7, True, b"a", ["a"],
]  # fmt: skip
