"""Names of the paths and faults, for whoever does not load the fake device."""

from __future__ import annotations

from typing import Any

TRAINING = (
    "train flat, released",
    "train hier",
    "train none, released",
    "train flat, recomputed",
    "train flat, flex_attention",
    "train from weights",
    "resume",
    "roll back",
)
RELEASING = ("analyze", "calibrate", "generate")
DRAFTING = {"mode": "speculative", "stage": 0, "k_draft": 4}
DECODING: dict[str, dict[str, Any]] = {
    "full": {"mode": "full"},
    "prefix": {"mode": "prefix", "stages": 1},
    "stage": {"mode": "stage", "stage": 0},
    "parallel": {"mode": "parallel", "stage_list": (0, 1)},
    "wand, first exit": {"mode": "wand"},
    "wand, no exit": {"mode": "wand", "deep": True},
    "speculative stage": {**DRAFTING, "drafter": "stage"},
    "speculative int8": {**DRAFTING, "drafter": "int8"},
    "speculative int4": {**DRAFTING, "drafter": "int4"},
    "speculative lookup": {**DRAFTING, "drafter": "lookup"},
    "sampled full": {"mode": "full", "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "sampled speculative": {**DRAFTING, "drafter": "stage", "temperature": 0.8},
}
"""Options of ``serving.generation`` by name; ``deep``: no stage is certain."""
FAULTS = {
    "step count on the host": "_fused_adamw_ over tensors on cpu and cuda",
    "lanes on the host": "found at least two devices",
    "rows on the host": "found at least two devices",
    "value embeddings in fp32": "flex_attention over torch.float32 where products are made in torch.bfloat16",
    "model on the host": "products",
    "a step that waits": "waits",
}
"""What tells of each: words of the error, or the count that differs."""
