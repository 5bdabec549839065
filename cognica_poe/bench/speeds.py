"""Measured speed of a checkpoint's cheaper modes against its plain decoding, behind the probe prompts."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cognica_poe.analysis.conditions import evaluation_mode, one_thread
from cognica_poe.analysis.probes import PROBES
from cognica_poe.bench.decoding import Settings, time_contenders

if TYPE_CHECKING:
    from cognica_poe.analysis.record import AnalysisRecord
    from cognica_poe.data.tokenizer import Tokenizer
    from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM

NEW_TOKENS = 60


def margins_of(record: AnalysisRecord) -> dict[str, list[float]]:
    """Margins of a record to leave early by, [K-1] each, by name: ``direct``, the stated agreements, and ``routed`` for
    the routing probe, whose positions leave after stage 0 or not at all."""
    rules = [rule for rule in record.exit_rules if rule.margins is not None]
    found = {"direct" if rule.stated is None else f"{rule.stated:g}": list(rule.margins or ()) for rule in rules}
    routing = record.routing
    if routing is not None and routing.threshold is not None:
        below = float(np.nextafter(np.float32(routing.threshold), np.float32(0.0)))  # a margin must be above
        found[f"routed {routing.cap:g}"] = [below, *[math.inf] * (len(record.wand_bounds) - 1)]
    return found


def measure_speeds(
    model: CognicaPoEForCausalLM,
    tokenizer: Tokenizer,
    bounds: Sequence[float],
    margins: Mapping[str, Sequence[float]],
    *,
    k_draft: int = 4,
    new_tokens: int = NEW_TOKENS,
    rounds: int = 3,
    log: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Rows of ``record.Speed``, one per mode; none for a model without stages to leave out, or of too short a context.

    At most ``new_tokens`` follow a prompt, as many as the context has room for. ``bounds`` [K-1]: of WAND, nats, as
    measured at this checkpoint; ``margins`` by name, [K-1] each: other rules to leave early by. The model's
    configuration is left as it was.
    """
    if model.config.poe_mode == "none" or model.config.num_stages < 2:
        return []
    device, config = next(model.parameters()).device, model.config
    prompts = [torch.tensor([[tokenizer.bos_id, *tokenizer.encode(probe.prompt)]], device=device) for probe in PROBES]
    new_tokens = min(new_tokens, config.max_position_embeddings - max(ids.shape[1] for ids in prompts))
    if new_tokens < 1:
        log("no speeds: the context is too short for the probe prompts")
        return []
    settings = Settings(new_tokens=new_tokens, rounds=rounds, k_drafts=(k_draft,), drafters=("stage",), margins=margins)
    model.config = copy.deepcopy(config)
    model.config.poe_wand_p99_bounds_per_stage_head = list(bounds)
    try:
        # As generate() runs: for steps of a small model a second thread costs more than it brings.
        small = device.type == "cpu" and config.hidden_size <= 512
        with evaluation_mode(model), one_thread() if small else contextlib.nullcontext():
            found = time_contenders(model, prompts, settings, False, log)
    finally:
        model.config = config
    return [
        {
            "mode": row["mode"] if row["k_draft"] is None else f"{row['mode']} {row['drafter']} {row['k_draft']}",
            "ratio": row["ratio_to_cached_greedy"],
            "low": row["ratio_interval"][0],
            "high": row["ratio_interval"][1],
            "prompts": len(prompts),
            "new_tokens": new_tokens,
            "dtype": row["dtype"],
            "device": device.type,
        }
        for row in found["rows"]
        if row["mode"] != "full" and row["drafter"] != "auto"
    ]
