"""Every public path on the fake device, each with what it asked of it: ``python -m tests.fakecuda GUARD FOLDER``.

A path is a function of a prepared run folder; it runs within ``watching`` and returns what else there is to say.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

from cognica_poe import pipeline
from cognica_poe.analysis import analyzer
from cognica_poe.analysis.wand import calibrate
from cognica_poe.data.tokenizer import load_tokenizer
from cognica_poe.modeling.blocks_cognica_poe import Attention
from cognica_poe.modeling.stages_cognica_poe import StageCache
from cognica_poe.release.loading import load
from cognica_poe.serving.generation import generate
from cognica_poe.serving.options import GenerationOptions
from cognica_poe.training import trainer
from cognica_poe.training.checkpoint import CheckpointFolder
from cognica_poe.training.guard import StepGuard
from cognica_poe.training.optim.optimizer import MuonAdamW
from cognica_poe.training.trainer import Trainer
from tests.fakecuda import device
from tests.fakecuda.names import DECODING, FAULTS
from tests.fakecuda.watch import Watch, watching
from tests.runs import small_recipe, with_training, write_texts

TRAINED, MORE = 6, 2
"""Steps of the prepared run, and steps that a path trains on the fake device."""
PROMPT = "def close(self):"


FEW = {"prompts": 2, "new_tokens": 4, "probe_tokens": 2}
"""What a release is measured on here: fake tensors take longer for an operation than real ones."""


def prepare(folder: Path) -> Path:
    """A run on the processor: data, tokenizer, two checkpoints, a record and a release of the last step."""
    assert analyzer.analyze.__kwdefaults__.keys() >= FEW.keys()
    analyzer.analyze.__kwdefaults__.update(FEW)
    recipe = small_recipe(write_texts(folder / "texts"), steps=TRAINED, checkpoint_every=3)
    release = dataclasses.replace(recipe.release, every=TRAINED, log_steps=False, val_max_bytes=3000)
    recipe, run = dataclasses.replace(recipe, release=release), folder / "run"
    pipeline.prepare(recipe, run, _silent)
    first = Trainer(recipe, run, pipeline.open_rows(run, recipe))
    first.train()
    pipeline.analyze_step(run, recipe, first.model.eval(), TRAINED, _silent)
    pipeline.export_step(run, recipe, first.model, TRAINED, _silent)
    return run


def _silent(line: str) -> None:
    pass


def _copy(run: Path, name: str, *parts: str) -> Path:
    """A run folder of its own with some parts of another."""
    copy = run.parent / name
    shutil.rmtree(copy, ignore_errors=True)
    for part in parts:
        source = run / part
        (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / part)
    return copy


# ---- training -----------------------------------------------------------------------------------------------------


def train(
    watch: Watch, run: Path, poe_mode: str = "flat", attention: str = "sdpa", released: bool = False, **training: Any
) -> dict[str, Any]:
    """A fresh run of ``MORE`` steps on the data of ``run``; with ``released`` a release behind the last of them."""
    recipe = small_recipe(run.parent / "texts", poe_mode, steps=MORE, checkpoint_every=MORE, compile="off")
    recipe = with_training(recipe, attention=attention, compute_dtype="bfloat16", **training)
    release = dataclasses.replace(recipe.release, every=MORE, log_steps=False, val_max_bytes=3000)
    recipe, new = dataclasses.replace(recipe, release=release), _copy(run, "train", "data", "tokenizer")
    pipeline.prepare(recipe, new, _silent)
    return _steps(watch, Trainer(recipe, new, pipeline.open_rows(new, recipe)), released)


def resume(watch: Watch, run: Path) -> dict[str, Any]:
    """The prepared run goes on, on the device, from the checkpoint that the processor wrote."""
    return _steps(watch, _resumed(run, "resume"))


def start_from_weights(watch: Watch, run: Path) -> dict[str, Any]:
    """A new run from the weights and the tokenizer of a release."""
    new = _copy(run, "from-weights", "data")
    recipe = with_training(pipeline.read_recipe(run), steps=MORE, compile="off", attention="sdpa")
    schedule = dataclasses.replace(recipe.training.schedule, warmup_steps=1)
    recipe = with_training(recipe, schedule=schedule)
    with _disable_current_modes():  # files alone
        pipeline.prepare(recipe, new, _silent, init_from=run / "release" / f"step-{TRAINED}")
    return _steps(watch, Trainer(recipe, new, pipeline.open_rows(new, recipe)))


def roll_back(watch: Watch, run: Path) -> dict[str, Any]:
    """The same, with every step left out until the run goes back to that checkpoint."""
    resumed = _resumed(run, "roll-back")
    spiking = resumed.recipe.training.guard.max_in_a_row

    def answers(tensor: torch.Tensor) -> list[float] | None:
        nonlocal spiking
        if tensor.dtype != torch.float64 or tuple(tensor.shape) != (4,):  # loss, gradient norm, finite, keep
            return None
        spiking -= 1
        return [1.0, 1.0, 1.0, float(spiking < 0)]

    watch.answers = answers
    found = _steps(watch, resumed)
    events = [json.loads(line)["event"] for line in (resumed.run / "events.jsonl").read_text().splitlines()]
    return {**found, "rolled back": events.count("roll back")}


def _resumed(run: Path, name: str) -> Trainer:
    new = _copy(run, name, "data", "tokenizer", "checkpoints", "recipe.json")
    recipe = with_training(pipeline.read_recipe(new), steps=TRAINED + 2 * MORE, compile="off", attention="sdpa")
    recipe = with_training(recipe, guard=dataclasses.replace(recipe.training.guard, max_in_a_row=2))
    recipe = dataclasses.replace(recipe, release=dataclasses.replace(recipe.release, every=1000))
    return Trainer(recipe, new, pipeline.open_rows(new, recipe), resume=True)


def _steps(watch: Watch, run: Trainer, released: bool = False) -> dict[str, Any]:
    """Train; say what the steps alone asked for, and where weights and state of the optimiser lie in the end."""
    within: list[dict[str, int]] = []
    step = run._train_step

    def counted() -> bool:
        before, waits = watch.counts.copy(), len(device.WAITS)
        done = step()
        within.append({**(watch.counts - before), "waits": len(device.WAITS) - waits})
        return done

    run._train_step = counted  # type: ignore[method-assign]
    run.train(_release_of(run) if released else lambda step: None)
    state = run.optimizer.state_dict().items()
    lie = {f"{kind}.{value.device.type}" for name, value in state for kind in [name.rpartition(".")[2]]}
    assert isinstance(run.optimizer, MuonAdamW)
    return {
        "steps": within,
        "state": sorted(lie),
        "weights": sorted({p.device.type for p in run.model.parameters()}),
        "saved": CheckpointFolder(run.run / "checkpoints").steps(),
        "reached": run.step,
    }


def _release_of(run: Trainer) -> Callable[[int], None]:
    def release(step: int) -> None:
        pipeline.analyze_step(run.run, run.recipe, run.model, step, _silent)
        pipeline.export_step(run.run, run.recipe, run.model, step, _silent)

    return release


# ---- release ------------------------------------------------------------------------------------------------------


def analyze(watch: Watch, run: Path) -> dict[str, Any]:
    """A checkpoint, measured and exported by the commands' own functions."""
    new = _copy(run, "analyze", "data", "tokenizer", "checkpoints", "recipe.json")
    recipe = pipeline.read_recipe(new)
    model = pipeline.checkpoint_model(new, recipe, TRAINED)
    record = pipeline.analyze_step(new, recipe, model, TRAINED, _silent)
    released = pipeline.export_step(new, recipe, model, TRAINED, _silent)
    return {"record": record.step, "release": released.name, "device": model.device.type}


def calibrate_bounds(watch: Watch, run: Path) -> dict[str, Any]:
    """The bounds of a release on held-out text."""
    model, _ = load(run / "release" / f"step-{TRAINED}")
    texts = [file.read_text()[:2000] for file in sorted((run.parent / "texts").glob("*.txt"))[:4]]
    result = calibrate(model, load_tokenizer(run / "tokenizer"), texts, tokens=1024)
    return {"bounds": len(result.bounds), "device": model.device.type}


# ---- decoding -----------------------------------------------------------------------------------------------------


def no(tensor: torch.Tensor) -> np.ndarray | None:
    """Stand-ins of truth values: nothing is certain, nothing has ended."""
    return np.zeros(tuple(tensor.shape), dtype=bool) if tensor.dtype == torch.bool else None


def decode(watch: Watch, run: Path, deep: bool = False, **options: Any) -> dict[str, Any]:
    """A continuation of 4 tokens and one of 8; a token costs a quarter of the difference."""
    watch.answers = no if deep else None
    model, tokenizer = load(run / "release" / f"step-{TRAINED}")
    model.generation_config.eos_token_id = model.config.eos_token_id = None  # all values are one: nothing ends early
    generate(model, tokenizer, PROMPT, GenerationOptions(max_new_tokens=1, **options))  # arranges the weights
    asked = []
    for length in (4, 8):
        before = watch.counts.copy()
        text = generate(model, tokenizer, PROMPT, GenerationOptions(max_new_tokens=length, **options))
        assert text.new_tokens == length
        asked.append(watch.counts - before)
    kinds = sorted(set(asked[0]) | set(asked[1]))
    per_token = {kind: (asked[1][kind] - asked[0][kind]) / 4 for kind in kinds}
    return {"per token": {kind: n for kind, n in per_token.items() if n}, "device": model.device.type}


def plain_generate(watch: Watch, run: Path) -> dict[str, Any]:
    """transformers' own ``generate``, by which backprop arms answer; it asks after each token whether that ends it."""
    asked = iter(range(1000))
    watch.answers = lambda tensor: [next(asked) >= 6] if tensor.dtype == torch.bool else None
    model, tokenizer = load(run / "release" / f"step-{TRAINED}")
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"].to(model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    return {"device": out.device.type, "length": out.shape[1] - ids.shape[1]}


# ---- all of them --------------------------------------------------------------------------------------------------


def paths() -> dict[str, Callable[[Watch, Path], dict[str, Any]]]:
    """The paths by name."""
    found: dict[str, Callable[[Watch, Path], dict[str, Any]]] = {
        "train flat, released": lambda watch, run: train(watch, run, released=True),
        "train hier": lambda watch, run: train(watch, run, "hier"),
        "train none, released": lambda watch, run: train(watch, run, "none", released=True),
        "train flat, recomputed": lambda watch, run: train(watch, run, recompute="layers"),
        "train flat, flex_attention": lambda watch, run: train(watch, run, attention="flex_attention"),
        "train from weights": start_from_weights,
        "resume": resume,
        "roll back": roll_back,
        "analyze": analyze,
        "calibrate": calibrate_bounds,
        "generate": plain_generate,
    }
    for name, options in DECODING.items():
        found[f"decode {name}"] = lambda watch, run, options=options: decode(watch, run, **options)
    return found


def report(path: Callable[[Watch, Path], dict[str, Any]], run: Path) -> dict[str, Any]:
    """What a path found and asked for, or its error."""
    with watching() as watch:
        try:
            found: dict[str, Any] = path(watch, run)
        except Exception:
            found = {"error": traceback.format_exc()}
    return {**found, "products": dict(watch.products), "places": dict(watch.places)}


def faults(run: Path) -> dict[str, dict[str, Any]]:
    """Paths with a fix taken back or a move forgotten: each must be found."""
    restore, place, check = MuonAdamW._restore, StageCache._place, StepGuard.check

    def step_on_the_host(optimizer: MuonAdamW, name: str, key: str, value: torch.Tensor) -> None:
        """How a step count once came back: where the file's tensor lies."""
        if key == "step":
            optimizer.adamw.state[optimizer.parameters[name]][key] = value.to(torch.float32, copy=True)
        else:
            restore(optimizer, name, key, value)

    def waiting(guard: StepGuard, *args: Any) -> torch.Tensor:
        keep = check(guard, *args)
        keep.item()
        return keep

    def by_values(attention: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> torch.Tensor:
        """How queries and keys once followed the values."""
        return device.block_attention(attention, q.to(v.dtype), k.to(v.dtype), v, mask)[0]

    cpu = torch.device("cpu")
    taken_back = {
        "step count on the host": (MuonAdamW, "_restore", step_on_the_host, resume),
        "a step that waits": (StepGuard, "check", waiting, resume),
        "lanes on the host": (StageCache, "_place", lambda *args: place(*args).cpu(), partial(decode, mode="full")),
        "model on the host": (pipeline, "default_device", lambda: cpu, analyze),
        "rows on the host": (trainer, "copy_to_device", lambda tensor, device: tensor, resume),
        "value embeddings in fp32": (Attention, "_attend", by_values, partial(train, attention="flex_attention")),
    }
    assert taken_back.keys() == FAULTS.keys()
    found = {}
    for name, (owner, attribute, fault, path) in taken_back.items():
        sound = getattr(owner, attribute)
        setattr(owner, attribute, fault)
        try:
            found[name] = report(path, run)
        finally:
            setattr(owner, attribute, sound)
    return found
