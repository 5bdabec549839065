"""How to generate and how to serve, as values: what the command line fills in, without a model in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cognica_poe.recipe.fields import LONGEST_CONTEXT, setting

Mode = Literal["full", "prefix", "stage", "wand", "speculative", "parallel"]
Drafter = Literal["stage", "int8", "int4", "lookup", "auto"]


@dataclass(frozen=True)
class GenerationOptions:
    """How to generate."""

    mode: Mode = "full"
    """full: pool of all stages; prefix: pool of the first --stages; stage: one head alone; wand: exit early where the
    top token cannot change; speculative: stage --stage drafts, the pool verifies; parallel: pool of chosen stages."""
    max_new_tokens: int = setting(64, low=1, high=LONGEST_CONTEXT)
    """Tokens to generate."""
    stages: int = setting(1, low=1, high=1024)
    """prefix: how many stages."""
    stage: int = setting(0, high=1023)
    """stage, speculative: which stage speaks or drafts, counted from 0."""
    stage_list: tuple[int, ...] = setting((0,), high=1023)
    """parallel: the stages to compose."""
    safety: float = setting(1.0, high=1_000_000)
    """wand: factor on the calibrated bounds."""
    k_draft: int = setting(4, low=1, high=1024)
    """speculative: drafted tokens per round."""
    drafter: Drafter = "stage"
    """speculative: who drafts: the first stages, quantised copies of them, looked-up n-grams, or what measures best."""
    temperature: float = setting(0.0, high=1000)
    """0 is greedy; above, tokens are sampled."""
    top_k: int | None = setting(None, low=1)
    """Sample among this many likeliest tokens."""
    top_p: float | None = setting(None, above=True, high=1)
    """Sample among the likeliest tokens of this total probability."""
    seed: int = 0
    """Seed of the sampling."""


@dataclass(frozen=True)
class ServerOptions:
    """Where to listen, and how the served model answers."""

    mode: Literal["full", "prefix", "stage", "wand", "speculative"] | None = None
    """Mode that answers; what the release's generation config says when omitted."""
    stages: int = setting(1, low=1, high=1024)
    """For mode prefix: how many stages."""
    stage: int = setting(0, high=1023)
    """For modes stage and speculative: which stage speaks or drafts, counted from 0."""
    drafter: Drafter = "auto"
    """For mode speculative: who drafts."""
    k_draft: int = setting(7, low=1, high=1024)
    """For mode speculative: drafts per round."""
    host: str = "localhost"
    """Address to listen at."""
    port: int = setting(8000, low=1, high=65_535)
    """Port to listen at."""
    device: str = "auto"
    """Where the model runs, such as cuda:0."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the weights; that of the release when auto."""
