"""Text from a release in every mode, with what the mode has to tell: speed, stages used, acceptance."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from cognica_poe.analysis.conditions import one_thread
from cognica_poe.errors import UserError

MODES = ("full", "prefix", "stage", "wand", "speculative", "parallel")


@dataclass(frozen=True)
class GenerationOptions:
    """How to generate."""

    mode: Literal["full", "prefix", "stage", "wand", "speculative", "parallel"] = "full"
    """full: pool of all stages; prefix: pool of the first --stages; stage: one head alone; wand: exit early where the
    top token cannot change; speculative: stage --stage drafts, the pool verifies; parallel: pool of chosen stages."""
    max_new_tokens: int = 64
    """Tokens to generate."""
    stages: int = 1
    """prefix: how many stages."""
    stage: int = 0
    """stage, speculative: which stage speaks or drafts, counted from 0."""
    stage_list: tuple[int, ...] = (0,)
    """parallel: the stages to compose."""
    safety: float = 1.0
    """wand: factor on the calibrated bounds."""
    draft_length: int = 4
    """speculative: drafted tokens per round."""
    drafter: Literal["stage", "int8", "int4", "lookup", "auto"] = "stage"
    """speculative: who drafts: the first stages, quantised copies of them, looked-up n-grams, or what measures best."""
    temperature: float = 0.0
    """0 is greedy; above, tokens are sampled."""
    top_k: int | None = None
    """Sample among this many likeliest tokens."""
    top_p: float | None = None
    """Sample among the likeliest tokens of this total probability."""
    seed: int = 0
    """Seed of the sampling."""


@dataclass(frozen=True)
class Generated:
    """Text and figures of one generation."""

    mode: str
    prompt: str
    text: str
    new_tokens: int
    seconds: float
    tokens_per_second: float
    mean_stages_used: float | None = None
    acceptance: float | None = None
    proposed: int | None = None
    accepted: int | None = None


def generate(model: Any, tokenizer: Any, prompt: str, options: GenerationOptions, streamer: Any = None) -> Generated:
    """Continue ``prompt``. Raises UserError for a wrong option, an empty vocabulary match or too long a prompt."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    common: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "streamer": streamer}
    if options.temperature > 0:
        common |= {"do_sample": True, "temperature": options.temperature, "seed": options.seed}
        common |= {name: value for name in ("top_k", "top_p") if (value := getattr(options, name)) is not None}
    extra: dict[str, Any] = {}
    began = time.perf_counter()
    try:
        with one_thread() if model.device.type == "cpu" and model.config.hidden_size <= 512 else torch.no_grad():
            out, extra = _run(model, ids, options, common)
    except ValueError as error:
        raise UserError(f"generate --mode {options.mode}: {error}") from error
    seconds = time.perf_counter() - began
    new = out[0, ids.shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    return Generated(options.mode, prompt, text, len(new), seconds, len(new) / seconds, **extra)


def _run(model: Any, ids: torch.Tensor, options: GenerationOptions, common: dict) -> tuple[torch.Tensor, dict]:
    match options.mode:
        case "full" if model.config.poe_mode == "none":
            return _plain(model, ids, common), {}
        case "full":
            return model.generate_prefix(ids, **common), {}
        case "prefix":
            return model.generate_prefix(ids, max_stages=options.stages, **common), {}
        case "stage":
            return model.generate_stage(ids, options.stage, **common), {}
        case "wand":
            out, used = model.generate_wand(ids, safety=options.safety, return_stages_used=True, **common)
            return out, {"mean_stages_used": used[used > 0].double().mean().item()}
        case "speculative":
            drafting = {"draft_stage": options.stage, "k_draft": options.draft_length, "drafter": options.drafter}
            out, facts = model.generate_speculative(ids, return_acceptance=True, **drafting, **common)
            return out, {name: facts[name] for name in ("acceptance", "proposed", "accepted")}
        case "parallel":
            return model.generate_parallel_composition(ids, list(options.stage_list), **common), {}
        case mode:
            raise UserError(f"unknown mode {mode!r}; choose one of {', '.join(MODES)}")


def _plain(model: Any, ids: torch.Tensor, common: dict) -> torch.Tensor:
    """Backprop arms answer through transformers' own ``generate``."""
    options = dict(common)
    seed = options.pop("seed", None)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, do_sample=options.pop("do_sample", False), **options)


def load_model(checkpoint: str, revision: str | None = None, cache_dir: Path | None = None) -> tuple[Any, Any]:
    """Model and tokenizer of a release folder, or of ``org/name`` in a Hub cache folder.

    Raises UserError when the folder or revision is missing, or damaged.
    """
    from cognica_poe.release.export import load_release
    from cognica_poe.release.publish.hub_folder import resolve_revision

    path = Path(checkpoint)
    if path.is_dir():
        return load_release(path)
    if cache_dir is None:
        raise UserError(
            f"no release folder {checkpoint}: pass the path of a folder that holds config.json and model.safetensors, "
            "or org/name with --cache-dir"
        )
    return load_release(resolve_revision(cache_dir, checkpoint, revision or "main"))
