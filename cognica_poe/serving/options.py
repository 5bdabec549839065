"""How to generate and how to serve, as values: what the command line fills in, without a model in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["full", "prefix", "stage", "wand", "speculative", "parallel"]
Drafter = Literal["stage", "int8", "int4", "lookup", "auto"]


@dataclass(frozen=True)
class GenerationOptions:
    """How to generate."""

    mode: Mode = "full"
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
    k_draft: int = 4
    """speculative: drafted tokens per round."""
    drafter: Drafter = "stage"
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
class ServerOptions:
    """Where to listen, and how the served model answers."""

    mode: Literal["full", "prefix", "stage", "wand", "speculative"] | None = None
    """Mode that answers; what the release's generation config says when omitted."""
    stages: int = 1
    """For mode prefix: how many stages."""
    stage: int = 0
    """For modes stage and speculative: which stage speaks or drafts, counted from 0."""
    drafter: Drafter = "auto"
    """For mode speculative: who drafts."""
    k_draft: int = 7
    """For mode speculative: drafts per round."""
    host: str = "localhost"
    """Address to listen at."""
    port: int = 8000
    """Port to listen at."""
    device: str = "auto"
    """Where the model runs, such as cuda:0."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the weights; that of the release when auto."""
