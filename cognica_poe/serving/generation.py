"""Text from a release in every mode, with what the mode has to tell: speed, stages used, acceptance."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, get_args

import torch

from cognica_poe.analysis.conditions import one_thread
from cognica_poe.errors import UserError
from cognica_poe.serving.options import GenerationOptions, Mode


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
        common |= {"do_sample": True, "temperature": options.temperature, "seed": options.seed or 0}
        # As transformers' generate(): among the 50 likeliest tokens, unless told otherwise.
        common |= {"top_k": 50 if options.top_k is None else options.top_k or None}
        common |= {} if options.top_p is None else {"top_p": options.top_p}
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


def generate_samples(model: Any, tokenizer: Any, prompt: str) -> list[Generated]:
    """One short greedy continuation of ``prompt`` in each mode that every trained model of its kind has."""
    modes: tuple[Mode, ...] = ("full", "prefix", "wand", "speculative")
    if model.config.poe_mode == "none":
        modes = ("full",)
    length = min(64, model.config.max_position_embeddings // 2)
    return [generate(model, tokenizer, prompt, GenerationOptions(mode=mode, max_new_tokens=length)) for mode in modes]


def _run(model: Any, ids: torch.Tensor, options: GenerationOptions, common: dict) -> tuple[torch.Tensor, dict]:
    match options.mode:
        case "full" if model.config.poe_mode == "none":
            return _plain(model, ids, common), {}
        case "full":
            return model.generate_prefix(ids, **common), {}
        case "prefix":
            return model.generate_prefix(ids, max_stages=1 if options.stages is None else options.stages, **common), {}
        case "stage":
            return model.generate_stage(ids, options.stage or 0, **common), {}
        case "exit":
            return model.generate_exit(ids, options.layer, **common), {}
        case "wand":
            safety = 1.0 if options.safety is None else options.safety
            chosen = {"safety": safety, "guarantee": options.guarantee}
            out, used = model.generate_wand(ids, **chosen, return_stages_used=True, **common)
            return out, {"mean_stages_used": used[used > 0].double().mean().item()}
        case "speculative":
            drafting: dict[str, Any] = {"draft_stage": options.stage or 0, "drafter": options.drafter or "stage"}
            drafting["draft_layer"] = options.layer
            drafting["k_draft"] = 4 if options.k_draft is None else options.k_draft
            out, facts = model.generate_speculative(ids, return_acceptance=True, **drafting, **common)
            return out, {name: facts[name] for name in ("acceptance", "proposed", "accepted")}
        case "parallel":
            return model.generate_parallel_composition(ids, list(options.stage_list or (0,)), **common), {}
        case mode:
            raise UserError(f"unknown mode {mode!r}; choose one of {', '.join(get_args(Mode))}")


def _plain(model: Any, ids: torch.Tensor, common: dict) -> torch.Tensor:
    """Backprop arms answer through transformers' own ``generate``."""
    options = dict(common)
    seed = options.pop("seed", None)
    options |= {"top_k": options["top_k"] or 0} if "top_k" in options else {}  # transformers' way to say all tokens
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, do_sample=options.pop("do_sample", False), **options)
