"""A run over several shards: packed beside the training, said in the metrics, resumed in the middle of one."""

import dataclasses
import shutil

import pytest

from cognica_poe import pipeline
from cognica_poe.files import sha256_file
from cognica_poe.training.journal import read_records
from cognica_poe.training.preparation import prepare
from cognica_poe.training.trainer import Trainer
from tests.runs import small_recipe, write_texts

STEPS = 14


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    texts = write_texts(tmp_path_factory.mktemp("texts") / "texts")
    settings = {"steps": STEPS, "batch_rows": 64, "micro_rows": 32, "compute_dtype": "float32"}
    made = small_recipe(texts, **settings, checkpoint_every=1, keep_checkpoints=STEPS)
    return dataclasses.replace(made, data=dataclasses.replace(made.data, shard_bytes=40_000))


def train(recipe, run, resume=False):
    prepare(recipe, run, print, resume)
    Trainer(recipe, run, pipeline.open_rows(run, recipe), resume=resume).train()
    return read_records(run / "metrics.jsonl")


def test_metrics_say_where_the_rows_stand_and_a_resumed_run_reads_the_same(recipe, tmp_path):
    metrics = train(recipe, tmp_path / "whole")
    rows = pipeline.open_rows(tmp_path / "whole", recipe)
    places = [(line["epoch"], line["shard"]) for line in metrics if "shard" in line]
    assert places == [rows.locate(64 * step - 1)[:2] for step in range(1, STEPS + 1)]
    assert rows.shards > 3 and len(set(places)) >= 3
    assert all(0 <= line["rows_wait"] < 1 for line in metrics if "shard" in line)
    first = rows.facts(0, 0).rows // 64 + 1  # a step in the middle of the second shard
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "rows")
    for step in range(first + 1, STEPS + 1):
        shutil.rmtree(tmp_path / "parts" / "checkpoints" / f"step-{step}")
    again = train(recipe, tmp_path / "parts", resume=True)
    assert [(line["epoch"], line["shard"]) for line in again if "shard" in line] == places
    weights = [tmp_path / name / "checkpoints" / f"step-{STEPS}" / "model.safetensors" for name in ("whole", "parts")]
    assert sha256_file(weights[0]) == sha256_file(weights[1])
