"""A run small enough for tests: a few hundred kB of the standard library, a model of a few thousand parameters."""

import dataclasses
import sysconfig
from pathlib import Path

from cognica_poe.recipe.fields import Recipe
from cognica_poe.recipe.named import RECIPES
from cognica_poe.recipe.rules import check

FILES = ("argparse", "ast", "bdb", "calendar", "cgi", "cmd", "code", "codecs", "copy", "csv", "difflib", "dis", "enum")


def write_texts(folder: Path) -> Path:
    """A folder of text files taken from the running Python."""
    folder.mkdir(parents=True)
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in FILES:
        if (library / f"{name}.py").is_file():
            (folder / f"{name}.txt").write_text((library / f"{name}.py").read_text()[:30_000])
    return folder


def with_training(recipe: Recipe, **changes) -> Recipe:
    """The recipe with other training fields."""
    return dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, **changes))


def with_ranks(recipe: Recipe, **changes) -> Recipe:
    """The recipe with other fields of ``training.ranks``."""
    return with_training(recipe, ranks=dataclasses.replace(recipe.training.ranks, **changes))


def small_recipe(texts: Path, poe_mode: str = "flat", **training) -> Recipe:
    """A recipe of two stages on ``texts``."""
    tiny = RECIPES["tiny"]
    stages = (2, 1) if poe_mode != "none" else (3,)
    model = dataclasses.replace(
        tiny.model,
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        short_window=16,
        window_pattern="SL",
        poe_mode=poe_mode,
        poe_stage_layers=stages,
        per_stage_head=poe_mode != "none",
    )
    settings = {"steps": 12, "batch_rows": 4, "micro_rows": 2, "checkpoint_every": 3, **training}
    warmup = min(tiny.training.schedule.warmup_steps, settings["steps"])
    settings.setdefault("schedule", dataclasses.replace(tiny.training.schedule, warmup_steps=warmup))
    return check(
        dataclasses.replace(
            tiny,
            name="small-test",
            model=model,
            data=dataclasses.replace(tiny.data, mix=str(texts), val_min_bytes=20_000, case_aug_prob=0.15),
            training=dataclasses.replace(tiny.training, **settings),
            release=dataclasses.replace(tiny.release, repo_id="test/small", every=6, val_max_bytes=6000),
        )
    )
