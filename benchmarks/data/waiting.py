"""How long steps wait for their rows while shards are packed beside the training."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from cognica_poe import pipeline
from cognica_poe.recipe.fields import Recipe
from cognica_poe.recipe.named import RECIPES
from cognica_poe.training.journal import read_records
from cognica_poe.training.preparation import prepare
from cognica_poe.training.trainer import Trainer

EPOCHS = 3


def waiting(text: Path, work: Path) -> dict[str, Any]:
    """Three epochs of a small model on ``text``, cut to 1.5 MB in about four shards."""
    run = work / "waiting"
    shutil.rmtree(run, ignore_errors=True)
    recipe = _recipe(text, 1)
    prepare(recipe, run / "first", print)
    rows = pipeline.open_rows(run / "first", recipe)
    total = sum(rows.rows_per_epoch(epoch) for epoch in range(EPOCHS))
    recipe = _recipe(text, total // recipe.training.batch_rows)
    prepare(recipe, run / "run", print)
    Trainer(recipe, run / "run", pipeline.open_rows(run / "run", recipe, print)).train()
    lines = [line for line in read_records(run / "run" / "metrics.jsonl") if "rows_wait" in line]
    step_tokens = lines[0]["tokens"]
    seconds = [step_tokens / line["tokens_per_second"] for line in lines]
    waits = [line["rows_wait"] * second for line, second in zip(lines, seconds, strict=True)]
    borders = [i for i in range(1, len(lines)) if lines[i]["epoch"] != lines[i - 1]["epoch"]]
    return {
        "steps": len(lines),
        "epochs": lines[-1]["epoch"] + 1,
        "shards": len({line["shard"] for line in lines}),
        "seconds": round(sum(seconds), 1),
        "share_waited": round(sum(waits) / sum(seconds), 5),
        "share_waited_after_the_first_step": round(sum(waits[1:]) / sum(seconds[1:]), 5),
        "seconds_waited_at_borders_of_epochs": [round(waits[i], 4) for i in borders],
        "longest_wait_after_the_first_step": round(max(waits[1:]), 4),
        "median_step": round(sorted(seconds)[len(seconds) // 2], 4),
    }


def _recipe(text: Path, steps: int) -> Recipe:
    tiny = RECIPES["tiny"]
    data = dataclasses.replace(
        tiny.data, mix=str(text), max_bytes=1_500_000, shard_bytes=400_000, val_min_bytes=20_000, tokenizer_bytes=10**7
    )
    model = dataclasses.replace(
        tiny.model,
        num_hidden_layers=3,
        poe_stage_layers=(1, 1, 1),
        hidden_size=128,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=512,
    )
    training = dataclasses.replace(tiny.training, steps=steps, checkpoint_every=10**6, eval_every=0)
    schedule = dataclasses.replace(training.schedule, warmup_steps=0)
    training = dataclasses.replace(training, schedule=schedule)
    return dataclasses.replace(tiny, name="waiting", model=model, data=data, training=training)
