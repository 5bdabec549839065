"""JSON that is sound and says what cannot be."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.border.odd_files import OddFile, Spoil

RECIPES: dict[str, tuple[Any, ...]] = {
    "name": (
        None,
        7,
        "",
        "..",
        "../x",
        "a/b",
        "x" * 300,
        KeyError,
    ),
    "training.steps": (
        0,
        -1,
        1.5,
        "4",
        True,
        None,
        10**30,
        [4],
    ),
    "training.optimizer.matrix_lr": (
        -0.1,
        "x",
        float("nan"),
        float("inf"),
        1000000000.0,
    ),
    "model.poe_stage_layers": (
        [],
        [3, 0],
        [1, 1],
        ["2", 1],
        [2.0, 1],
        3,
        [[2], 1],
        [-1, 4],
    ),
    "model.head_dim": (
        0,
        15,
        10**9,
    ),
    "model.poe_mode": (
        "",
        "FLAT",
        None,
    ),
    "model.window_pattern": (
        "",
        "X",
        3,
    ),
    "release.repo_id": (
        "",
        "x",
        "a/b/c",
        "../..",
        None,
    ),
    "data.case_aug_prob": (
        -1,
        2,
        "x",
    ),
    "model": (
        None,
        [],
    ),
    "training.guard": (3,),
    "speed": (1,),
    "model.speed": (1,),
    "training.ranks.parallel": ("x",),
}
MIXES: dict[str, tuple[Any, ...]] = {
    "name": (
        KeyError,
        None,
        "",
        [],
    ),
    "sources": (
        KeyError,
        {},
        [],
        "x",
        [1],
        [None],
    ),
    "sources.0": ({},),
    "sources.0.share": (
        "x",
        -1,
        float("nan"),
        None,
        10**400,
        True,
    ),
    "sources.0.revision": (
        None,
        "main",
        7,
        "A" * 40,
    ),
    "sources.0.configs": (
        [],
        3,
        [3],
    ),
    "sources.0.languages": (
        [],
        None,
    ),
    "sources.0.dataset": (
        "",
        None,
        "../..",
    ),
    "sources.0.name": (
        "",
        3,
    ),
    "sources.0.split": ("train",),
    "sources.0.text_column": (None,),
    "sources.0.bytes_per_token": (0, -1, 1e9, "x", None, float("nan")),
    "sources.0.text_per_byte": (0, "x", 10**400),
    "sources.0.pinned": (3, [1], [{}], {}, []),
    "sources.0.pinned.0.path": ("", "../a.parquet", "/a.parquet", "a.csv", 3),
    "sources.0.pinned.0.size": (-1, "x", 1.5),
    "sources.0.pinned.0.sha256": ("", "A" * 64, 3, KeyError),
    "sources.0.pinned.0.config": ("other", 3),
    "bytes": (0, -1, "x", 2**70),
    "sources.0.files": (
        3,
        "{x}",
    ),
    "sources.0.speed": (1,),
    "sources.0.licence": (KeyError,),
    "sources.4.languages": (["ko", "zh"],),
    "sources.1.name": ("fineweb-edu",),
    "speed": (1,),
    "sources.0.id_column": ([],),
}
CONFIGS: dict[str, tuple[Any, ...]] = {
    "vocab_size": (
        10,
        401,
        "400",
        -1,
        None,
    ),
    "hidden_size": (
        64,
        0,
        10**12,
    ),
    "num_hidden_layers": (
        2,
        4,
        10**6,
    ),
    "poe_stage_layers": (
        [1, 1, 1],
        [3],
        [],
        None,
        "x",
    ),
    "head_dim": (
        32,
        15,
    ),
    "num_attention_heads": (3,),
    "num_key_value_heads": (2,),
    "intermediate_size": (65,),
    "poe_mode": (
        "x",
        None,
        3,
    ),
    "window_pattern": (
        "",
        3,
    ),
    "max_position_embeddings": (
        0,
        "x",
    ),
    "model_type": (
        "llama",
        KeyError,
        3,
    ),
    "per_stage_head": (
        False,
        "x",
    ),
    "poe_alpha": (
        "x",
        float("nan"),
    ),
    "dtype": (
        "float99",
        3,
    ),
    "short_window": (
        -1,
        "x",
    ),
    "layer_types": (["x"],),
    "rope_theta": ("x",),
    "tie_word_embeddings": (True,),
}
MANIFESTS: dict[str, tuple[Any, ...]] = {
    "shards": (
        [],
        {},
        None,
    ),
    "shards.0.file": (
        "../x",
        3,
        "none.parquet",
    ),
    "shards.0.documents": (
        10**6,
        "x",
    ),
    "shards.0.sha256": ("0" * 64,),
    "shards.0.split": (
        "x",
        "val",
    ),
    "splits": ({},),
    "splits.train.documents": (
        -1,
        3,
    ),
    "splits.train": (KeyError,),
    "seed": ("x",),
    "speed": (1,),
    "schema_version": (
        2,
        "x",
    ),
}
RECORDS: dict[str, tuple[Any, ...]] = {
    "step": (
        3,
        "x",
        -1,
    ),
    "bpb": (None,),
    "bpb.full": (
        "x",
        float("nan"),
    ),
    "bpb.stage": ([],),
    "wand_bounds": (
        None,
        ["x"],
    ),
    "schema_version": (2,),
    "validation": (KeyError,),
    "speculative": ([],),
    "speed": (1,),
}
"""Values that the fields cannot have, by path; KeyError: the field is missing."""


def _pairs(values: dict[str, tuple[Any, ...]]) -> Iterator[tuple[str, Any]]:
    return ((path, value) for path, several in values.items() for value in several)


def _value(path: str, value: Any) -> Spoil:
    def spoil(file: Path) -> None:
        whole = json.loads(file.read_text())
        at = whole
        *heads, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        for head in heads:
            at = at[head]
        if value is KeyError:
            del at[last]
        else:
            at[last] = value
        file.write_text(json.dumps(whole))

    return spoil


def wrong_values() -> Iterator[OddFile]:
    """JSON that is sound and says what cannot be."""
    for path, value in _pairs(RECIPES):
        yield OddFile(f"recipe {path} {value!r:.40}", "recipe.json", _value(path, value), "params {recipe}")
    build = "data build {base}/mix.json --max-bytes 1000 --out {new}"
    for path, value in _pairs(MIXES):
        yield OddFile(f"mix {path} {value!r:.40}", "mix.json", _value(path, value), build)
    yield OddFile("mix that no network gives", "mix.json", lambda file: None, build)
    for path, value in _pairs(CONFIGS):
        yield OddFile(
            f"config {path} {value!r:.40}",
            "run/release/step-4/config.json",
            _value(path, value),
            "generate {release} Hi --max-new-tokens 4",
            "run/release/step-4",
        )
    pack = "data pack {run}/data --tokenizer {run}/tokenizer --out {new} --row-len 65"
    for path, value in _pairs(MANIFESTS):
        yield OddFile(
            f"manifest {path} {value!r:.40}", "run/data/manifest.json", _value(path, value), pack, "run/data", "data"
        )
    for path, value in _pairs(RECORDS):
        for line in ("export {run} --step 2 --out {new}", "report {run} --out {new}"):
            yield OddFile(
                f"record {path} {value!r:.40}: {line.split()[0]}", "run/analysis/step-2.json", _value(path, value), line
            )
