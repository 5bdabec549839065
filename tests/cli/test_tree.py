"""The tree of commands: every node explains itself without torch, names its arguments, and refuses in one line."""

import inspect
import json
import os
import re
import subprocess
import sys
import time

import pytest

from cognica_poe import __version__
from cognica_poe.cli.main import Group, parse, walk
from cognica_poe.errors import UserError
from cognica_poe.recipe.named import RECIPES

NODES = dict(walk())
COMMANDS = {words: node for words, node in NODES.items() if not isinstance(node, Group)}
ABOUT_RECIPES = [words for words, node in COMMANDS.items() if "settings" in inspect.signature(node).parameters]
HEAVY = ("torch", "transformers", "pyarrow", "matplotlib", "datasets", "pydantic", "numpy")

# Every help text that is asked for, in one process, and what was imported for them.
HELP = f"""
import contextlib, io, json, sys
from cognica_poe.cli.main import main
texts = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        try:
            main([*words, "--help"])
        except SystemExit as end:
            assert end.code == 0, words
    texts.append(text.getvalue())
print(json.dumps([texts, [name for name in {HEAVY} if name in sys.modules]]))
"""


def call(*words, **setting):
    command = [sys.executable, "-m", "cognica_poe.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "100", **setting})


@pytest.fixture(scope="module")
def texts() -> dict[tuple[str, ...], str]:
    """Help of every node, and of a command about a recipe also with one."""
    asked = [*NODES, *((*words, "tiny") for words in ABOUT_RECIPES)]
    done = subprocess.run([sys.executable, "-c", HELP, json.dumps(asked)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, imported = json.loads(done.stdout)
    assert imported == []
    return dict(zip(asked, found, strict=True))


def test_the_tree_is_whole():
    names = {" ".join(words) for words in COMMANDS}
    assert {"run", "train", "plan", "generate", "data build", "tokenizer train", "bench memory"} <= names
    assert [" ".join(words) for words in ABOUT_RECIPES] == ["run", "train", "plan"]


@pytest.mark.parametrize("words", NODES, ids=" ".join)
def test_help(texts, words):
    text, node = texts[words], NODES[words]
    assert text.startswith("usage: " + " ".join(("cognica-poe", *words)))
    if isinstance(node, Group):
        assert all(re.search(rf"^. +• {word} ", text, re.MULTILINE) for word in node.commands)
    else:
        summary = inspect.getdoc(node).partition("\n")[0]
        assert summary in " ".join(text.split())


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_arguments_have_names(texts, words):
    for text in (texts[words], texts.get((*words, "tiny"), "")):
        assert not re.search(r"\b(STR|INT|FLOAT)\b|\{None\}", text)
    usage = texts[words].partition("\n\n")[0]
    for parameter in inspect.signature(COMMANDS[words]).parameters:
        if parameter in ("settings", "cluster", "options", "cleaning"):  # their fields are options
            continue
        text = texts[(*words, "tiny")] + usage if words in ABOUT_RECIPES else texts[words]
        named = {"recipe": "RECIPE", "run": "RUN", "runs": "RUN", "prompt": "PROMPT", "checkpoint": "CHECKPOINT"}
        named |= {"mix": "MIX", "data": "DATA", "stage": "STAGE", "number": "N", "table": "CSV"}
        option = rf"--(no-)?{parameter.replace('_', '-')}\b"
        assert re.search(option, text) or named[parameter] in usage, parameter


@pytest.mark.parametrize("words", ABOUT_RECIPES, ids=" ".join)
def test_a_command_about_a_recipe_has_its_fields_as_options(texts, words):
    assert all(name in texts[words] for name in RECIPES)
    text = texts[(*words, "tiny")]
    assert re.search(r"--training\.steps N\W+\(default: 200; 1 to 1000000000\)", text)
    assert "--training.ranks.parallel {rows,stages}" in text and "--training.guard.spike-sigma X" in text
    made = parse([*words, "tiny", "--training.steps", "500", "--data.max-bytes", "7"]).keywords["settings"]
    assert (made.training.steps, made.data.max_bytes, made.model) == (500, 7, RECIPES["tiny"].model)
    assert parse([*words, "tiny", "--data.max-bytes", "None"]).keywords["settings"] == RECIPES["tiny"]


@pytest.mark.parametrize("words", [(), ("run", "tiny"), ("bench", "train")], ids=" ".join)
def test_help_comes_at_once(words):
    """Half a second is the aim; the bound leaves room for a loaded machine, and none for an import of torch."""
    took = []
    for _ in range(3):
        began = time.perf_counter()
        done = call(*words, "--help")
        took.append(time.perf_counter() - began)
        assert done.returncode == 0, done.stderr
    assert min(took) < 2.0


def test_no_words_are_a_call_for_help_and_the_version_is_an_option(texts):
    assert call().stdout == call("--help").stdout
    assert call("--version").stdout == f"cognica-poe {__version__}\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("rnu", "unknown command 'rnu': did you mean 'run'? commands are run, train, plan"),
        ("data", "data: name a command; commands are data mix, data build, data pack, data task, data which-docs"),
        ("data packs", "unknown command 'data packs': did you mean 'data pack'?"),
        ("--verbose", "unknown option --verbose: a command comes first"),
        ("run", "run: name a recipe first, such as `cognica-poe run tiny`; recipes are tiny,"),
        ("plan --gpus 3", "plan: name a recipe first, such as `cognica-poe plan tiny`"),
        ("run tinny", "unknown recipe 'tinny': did you mean 'tiny'?"),
        ("run tiny --traning.steps 5", "run: unknown option --traning.steps (did you mean --training.steps?)"),
        ("run tiny --training.setps=5", "`cognica-poe run tiny --help` lists what it takes"),
        ("run tiny --seed 5", "run: unknown option --seed"),
        ("run tiny --training.steps abc", "run: --training.steps: 'abc' is no whole number"),
        ("run tiny --training.compile yes", "invalid choice 'yes' for argument '--training.compile'"),
        ("run tiny --out", "Missing value for argument '--out'"),
        ("data pack --epoch 3", "data pack: missing DATA, --tokenizer PATH, --out PATH"),
        ("data pack a b --tokenizer t --out o", "data pack: 'b' is one word too many"),
        ("generate x", "generate: missing PROMPT; `cognica-poe generate --help` lists what it takes"),
        ("generate a b --top-k many", "generate: --top-k: 'many' is no whole number"),
        ("generate a b --mode fast", "invalid choice 'fast' for argument '--mode'"),
        ("bench train --shape 4x64", "bench train: unknown option --shape (did you mean --shapes?)"),
    ],
)
def test_a_wrong_line_is_answered_in_one(words, says):
    with pytest.raises(UserError) as error:
        parse(words.split())
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("setting", [{}, {"PYTHONIOENCODING": "ascii"}, {"COLUMNS": "30"}], ids=str)
def test_one_line_on_stderr_and_exit_code_two(setting):
    """Whatever the terminal is like."""
    for words, says in (
        ("run tiny --name", "Missing value for argument '--name'"),
        ("export", "missing RUN, --step N"),
    ):
        done = call(*words.split(), **setting)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("cognica-poe: ") and done.stderr.count("\n") == 1
        assert says in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("bench train --steps 0", "bench train: --steps is 0; it must be at least 1"),
        ("bench train --rounds 99999999", "--rounds is 99999999; it must be at most 1,000,000"),
        ("bench decode tiny --synthetic-acceptance nan", "--synthetic-acceptance is nan; it must be at least 0"),
        ("bench decode tiny --k-draft 4 0", "bench decode: --k-draft is 0; it must be at least 1"),
        ("plan tiny --mfu inf", "plan: --mfu is inf; it must be at most 1"),
        ("plan tiny --network-gbit 0", "plan: --network-gbit is 0.0; it must be above 0"),
        ("plan tiny --training.steps 0", "recipe tiny: training.steps is 0; it must be at least 1"),
        ("run tiny --model.poe-stage-layers 3 -2", "recipe tiny: model.poe-stage-layers is -2; it must be at least 1"),
        ("run tiny --data.max-bytes 9999999999999999999", "data.max-bytes is 9999999999999999999; that is too large"),
        ("run tiny --training.guard.spike-sigma inf", "training.guard.spike-sigma is inf; that is too large"),
        ("generate a b --temperature 1 --top-p -inf", "generate: --top-p is -inf; it must be above 0"),
        ("serve a --port 65536", "serve: --port is 65536; it must be at most 65,535"),
        ("data pack a --tokenizer t --out o --row-len 3", "data pack: --row-len is 3; it must be at least 4"),
        ("calibrate a --text t --tokens -1", "calibrate: --tokens is -1; it must be at least 1"),
    ],
)
def test_a_number_out_of_its_range_is_refused_before_the_command(words, says):
    with pytest.raises(UserError) as error:
        parse(words.split())
    assert says in str(error.value) and "\n" not in str(error.value)


def test_parsing_calls_nothing(tmp_path):
    call = parse(["export", str(tmp_path), "--step", "3"])
    assert call.keywords == {"run": tmp_path, "step": 3, "out": None, "control": None, "shallow": None}
    with pytest.raises(UserError, match="not a run folder"):
        call()
