"""Analysis records in the JSON layout of a run, made by formula: no model needed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from cognica_poe.data.manifest import SPLITS, DataManifest
from cognica_poe.files import write_bytes, write_json, write_manifest
from cognica_poe.seals import sealed_line, write_sealed

STAGES = 4
HOSTILE = "a | b `code` <script>alert(1)</script> [x](http://evil) \u202eabc\x1b[31m\n# heading\n---\n" + "long " * 200


def difference(value: float, half: float) -> dict[str, float]:
    """A difference with a symmetric interval."""
    return {"value": value, "low": value - half, "high": value + half}


def probe(prompt: str, text: str, expected: str, answer: str | None, reason: str | None = None, facts=None) -> dict:
    """A graded continuation."""
    return {
        "prompt": prompt,
        "continuation": text,
        "expected": expected,
        "correct": answer == expected,
        "answer": answer,
        "reason": reason,
        "facts": facts or {},
    }


def make_record(step: int, *, name: str = "tiny-poe", path: str = "pool", stages: int = STAGES) -> dict[str, Any]:
    """A record whose figures fall with ``step`` as those of a real run do."""
    full = 4.2 / (1 + step / 60) ** 0.35
    stages = stages if path == "pool" else 1
    stage = [full * (1.006 - 0.002 * k) for k in range(stages)] if stages > 1 else [full]
    exits = [1.0]
    if stages > 1:
        exits = [min(0.7, step / 800), *[0.1] * (stages - 2)]
        exits.append(1 - sum(exits))
    return {
        "schema_version": 1,
        "step": step,
        "tokens_seen": step * 16384,
        "model": {
            "name": name,
            "parameters": 4_123_456,
            "poe_mode": "flat" if path == "pool" else "none",
            "stage_layers": [8 // stages] * stages,
            "weights_sha256": f"{step:064x}",
        },
        "path": path,
        "bpb": {
            "full": full,
            "stage": stage,
            "prefix": [*[(stage[k] + full) / 2 for k in range(stages - 1)], full],
            "plain": full * 1.02,
            "mean_stage": sum(stage) / stages,
        },
        "accuracy": {
            "full": 0.5 - full / 10,
            "stage": [0.49 - full / 10] * stages,
            "prefix": [*[0.495 - full / 10] * (stages - 1), 0.5 - full / 10],
            "plain": 0.45 - full / 10,
        },
        "gaps": {
            "stage": [difference(full - value, 0.002) for value in stage],
            "prefix": [difference(full - (value + full) / 2, 0.001) for value in stage[:-1]],
        },
        "intervals": {
            "full": [full - 0.02, full + 0.02],
            "stage": [[value - 0.02, value + 0.02] for value in stage],
            "prefix": [[full - 0.03, full + 0.03]] * stages,
            "plain": [full * 1.02 - 0.02, full * 1.02 + 0.02],
        },
        "accuracy_intervals": {
            "full": [0.1, 0.6],
            "stage": [[0.1, 0.6]] * stages,
            "prefix": [[0.1, 0.6]] * stages,
            "plain": [0.1, 0.6],
        },
        "wand_bounds": [3.2 + step / 1000, 1.5, 1.1, 0.9][: stages - 1],
        "wand": {"safety": 1.0, "positions": 4096, "exit_fraction": exits, "agreement": 0.9987},
        "speculative": {
            "acceptance": 0.8 if stages > 1 else None,
            "proposed": 400 if stages > 1 else 0,
            "accepted": 320 if stages > 1 else 0,
            "rounds": 100 if stages > 1 else 0,
            "draft_stage": 0,
            "k_draft": 4,
            "prompts": 7,
            "low": 0.76,
            "high": 0.84,
        },
        "baseline": {"xz_bpb": 2.4, "xz_primed_bpb": 1.9},
        "validation": {"documents": 210, "bytes": 1_000_000, "tokens": 250_000, "sha256": "ab" * 32, "window": 512},
        "probes": [
            probe("The capital of France is", HOSTILE, "Paris", None, "no answer"),
            probe("The opposite of hot is", " cold.", "cold", "cold"),
            probe("The chemical symbol of gold is", " Ag|<b>", "Au", "Ag|<b>", facts={"atomic number 79": step > 100}),
        ],
        "seconds": 12.5,
        "versions": {"torch": "2.13.0"},
        "routing": {
            "cap": 0.02,
            "fraction": 0.61,
            "regression_rate": 0.019,
            "threshold": 1.25,
            "stage0_cost": 0.51,
            "projected_speedup": 1.43,
            "positions": 4096,
        },
    }


RELEASE = {
    "name": "tiny-poe",
    "repo_id": "cognica/tiny-poe",
    "license": "apache-2.0",
    "languages": ["en"],
    "config": {"num_hidden_layers": 8, "hidden_size": 256, "poe_stage_layers": [2, 2, 2, 2], "window_pattern": "SSSL"},
    "data": {
        "sources": [
            {
                "name": "docs|x",
                "languages": ["en"],
                "licence": "PSF",
                "documents": 10,
                "bytes": 900,
                "share_reached": 0.25,
            }
        ]
    },
}


def make_run(folder: Path, *, name: str = "tiny-poe", path: str = "pool", steps: tuple[int, ...] = (0, 100, 200, 300)):
    """A run folder with records, metrics of every step, a cut last line, a recipe, events and a data manifest."""
    for step in steps:
        write_sealed(folder / "analysis" / f"step-{step}.json", make_record(step, name=name, path=path))
    lines = []
    for step in range(1, steps[-1] + 1):
        loss = 9.0 / (1 + step / 15) ** 0.4 + 0.1 * math.sin(step * 7.3)
        line = {"step": step, "loss": loss, "tokens": step * 16384, "lr_scale": min(1.0, step / 20)}
        line["tokens_per_second"] = 5200 + 150 * math.sin(step)
        if path == "pool":
            line["loss_stages"] = [loss * (1.03 - 0.01 * k) for k in range(STAGES)]
        lines.append(sealed_line(line))
    write_bytes(folder / "metrics.jsonl", ("\n".join(lines) + '\n{"step": 9999, "lo').encode())
    event = sealed_line({"step": 120, "event": "resume", "world_size": 1})
    write_bytes(folder / "events.jsonl", f"{event}\n".encode())
    recipe = {"name": name, "description": "A model <small> enough for a laptop.", "model": {"hidden_size": 256}}
    write_sealed(folder / "recipe.json", recipe)
    write_json(folder / "data" / "manifest.json", _data_manifest())
    write_manifest(folder / "data", "data")
    return folder


def _data_manifest() -> dict[str, Any]:
    sources = [{**source, "val_documents": 1, "val_bytes": 90} for source in RELEASE["data"]["sources"]]
    asked = {"mix": "docs", "seed": 0, "val_fraction": 0.1, "val_min_bytes": 1, "max_bytes": None}
    held = {
        "documents": 10,
        "bytes": 900,
        "splits": {split: {"documents": 0, "bytes": 0} for split in SPLITS},
        "shards": [],
        "sources": sources,
    }
    return DataManifest.model_validate({**asked, **held, "dropped": {}, "versions": {}}).model_dump(mode="json")
