"""lm-evaluation-harness on a release: its answers by path, BOS in front of every row, results in a sealed file."""

import json
import sys

import pytest
import torch

from cognica_poe.analysis.continuations import Path, Scorer
from cognica_poe.cli.main import main
from cognica_poe.data.tokenizer import load_tokenizer, train_tokenizer
from cognica_poe.errors import UserError
from cognica_poe.release.export import export_release
from cognica_poe.release.loading import load
from cognica_poe.seals import read_sealed
from cognica_poe.serving import harness
from tests.conftest import make_model
from tests.release.conftest import BOUNDS, record_of


def test_a_missing_harness_is_one_line(monkeypatch, release_folder, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit) as end:
        main(["eval", str(release_folder), "--tasks", "lambada_openai"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and "pip install 'cognica-poe[eval]'" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--path", "prefix"], "needs --stages"),
        (["--path", "stage"], "needs --stage"),
        (["--stages", "2"], "--stages does nothing with --path full"),
        (["--path", "prefix", "--stages", "2", "--stage", "1"], "--stage does nothing with --path prefix"),
    ],
)
def test_options_of_another_path_are_refused(words, said, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["eval", str(tmp_path), "--tasks", "x", *words])
    assert said in capsys.readouterr().err


def test_spaces_at_the_end_of_a_context_begin_the_continuation():
    class Words:
        def encode(self, text):
            return list(text.encode())

    assert harness._pair(Words(), "a b ", "c") == (list(b"a b"), list(b" c"))
    assert harness._pair(Words(), "", "c") == ([], list(b"c"))


def test_results_of_one_set_of_weights_are_kept_together(tmp_path):
    file, of = tmp_path / "tasks-2.json", {"name": "tiny", "step": 2, "weights_sha256": "ab" * 32}

    def found(path, value):
        return {"path": path, "harness": "0.4", "limit": None, "seed": 0, "tasks": {"arc": {"metrics": {"acc": value}}}}

    for path, value in (("full", 0.1), ("stage 0", 0.2), ("full", 0.3)):
        harness.store(file, of, found(path, value))
    stored = read_sealed(file, "evaluation", "delete it")
    assert stored["weights_sha256"] == "ab" * 32
    assert [(e["path"], e["metrics"]["acc"]) for e in stored["evaluations"]] == [("full", 0.3), ("stage 0", 0.2)]
    with pytest.raises(UserError, match="no evaluation of these weights"):
        harness.store(file, {**of, "weights_sha256": "cd" * 32}, found("full", 0.1))


@pytest.fixture(scope="module")
def release_folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("evaluated")
    tokenizer = train_tokenizer(
        ["def f(x): return x\nclass A: import os\nwhile True: and\n" * 20], 275, place / "tokenizer"
    )
    model = make_model(dtype=torch.float32, vocab_size=tokenizer.vocab_size, max_position_embeddings=64)
    settings = {"record": record_of(model, 300), "wand_bounds": BOUNDS, "name": "tiny", "step": 300}
    return export_release(model, tokenizer.folder, place / "release", **settings)


@pytest.fixture
def tasks(tmp_path):
    """One task of each kind that the harness knows, on data of our own."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "data.jsonl").write_text(
        "".join(json.dumps({"q": q, "a": a, "b": b, "text": text}) + "\n" for q, a, b, text in (
            ("def f(", "x", "import os and", "def f(x): return x\n" * 40),
            ("class A", ":", "while True", "import os\n"),
        ))
    )  # fmt: skip
    common = f"""dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "data.jsonl"}}}}}
test_split: test
metadata: {{version: 1.0}}
"""
    for name, rest in {
        "own_choice": "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: ['{{a}}', '{{b}}']\n"
        "doc_to_target: 0\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n",
        "own_rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: bits_per_byte}]\n",
        "own_answer": "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
        "generation_kwargs: {until: ['\\n'], max_gen_toks: 8, do_sample: false}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
    }.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{common}{rest}")
    return folder


@pytest.mark.slow
def test_tasks_by_path(release_folder, tasks, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    model, _ = load(release_folder)
    tokenizer = load_tokenizer(release_folder)
    rows = [json.loads(line) for line in (tasks / "data.jsonl").read_text().splitlines()]
    out = tmp_path / "results.json"
    for words, path in (
        (["full"], Path()),
        (["prefix", "--stages", "1"], Path("prefix", 1)),
        (["stage", "--stage", "1"], Path("stage", 1)),
    ):
        command = ["eval", str(release_folder), "--tasks", "own_choice", "own_rolling", "own_answer", "--path", *words]
        main([*command, "--task-folder", str(tasks), "--out", str(out), "--json"])
        found = json.loads(capsys.readouterr().out)["tasks"]
        nats = Scorer(model, tokenizer.bos_id, path).rolling([tokenizer.encode(row["text"]) for row in rows])
        size = sum(len(row["text"].encode()) for row in rows)
        expected = -sum(nats) / 0.6931471805599453 / size
        assert found["own_rolling"]["metrics"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-6)
        assert found["own_choice"]["samples"] == 2 and 0 <= found["own_choice"]["metrics"]["acc,none"] <= 1
        assert 0 <= found["own_answer"]["metrics"]["exact_match,none"] <= 1
    stored = read_sealed(out, "evaluation", "delete it")["evaluations"]
    assert [(item["task"], item["path"]) for item in stored] == [
        (task, path) for task in ("own_answer", "own_choice", "own_rolling") for path in ("full", "prefix 1", "stage 1")
    ]
    for folder in (tmp_path / "missing", release_folder):
        with pytest.raises(SystemExit):
            main(["eval", str(release_folder), "--tasks", "x", "--task-folder", str(folder)])
        assert f"--task-folder {folder} holds no task" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["eval", str(release_folder), "--tasks", "no_such_task", "--task-folder", str(tasks)])
    assert "'no_such_task' is none of lm-evaluation-harness" in capsys.readouterr().err
