"""How to generate and how to serve, as values: what the command line fills in, without a model in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cognica_poe.errors import UserError
from cognica_poe.recipe.fields import LONGEST_CONTEXT, setting

Mode = Literal["full", "prefix", "stage", "exit", "wand", "speculative", "parallel"]
Drafter = Literal["stage", "int8", "int4", "lookup", "auto"]

READS: dict[str, tuple[str, ...]] = {
    "full": (),
    "prefix": ("stages",),
    "stage": ("stage",),
    "exit": ("layer",),
    "wand": ("safety", "guarantee"),
    "speculative": ("stage", "layer", "k_draft", "drafter"),
    "parallel": ("stage_list",),
}
"""Options that a mode reads beside those that all read; the options of other modes are refused."""


@dataclass(frozen=True)
class GenerationOptions:
    """How to generate; what is None is not given."""

    mode: Mode = "full"
    """full: pool of all stages; prefix: pool of the first --stages; stage, exit: one head alone; wand: exit early where
    the top token cannot change; speculative: stage --stage drafts, the pool verifies; parallel: pool of chosen stages.
    """
    max_new_tokens: int = setting(64, low=1, high=LONGEST_CONTEXT)
    """Tokens to generate."""
    stages: int | None = setting(None, low=1, high=1024)
    """prefix: how many stages; 1 when omitted."""
    stage: int | None = setting(None, high=1023)
    """stage, speculative: which stage speaks or drafts, counted from 0; the first when omitted."""
    layer: int | None = setting(None, low=1, high=1023)
    """exit, speculative: the exit behind this many layers answers, or drafts instead of a stage."""
    stage_list: tuple[int, ...] | None = setting(None, high=1023)
    """parallel: the stages to compose; the first alone when omitted."""
    safety: float | None = setting(None, high=1_000_000)
    """wand: factor on the calibrated bounds; 1 when omitted."""
    guarantee: float | None = setting(None, low=0, high=1, above=True)
    """wand: exit by the margins that were calibrated to agree with the full pool in this share of tokens, such as 0.99.
    """
    k_draft: int | None = setting(None, low=1, high=1024)
    """speculative: drafted tokens per round; 4 when omitted."""
    drafter: Drafter | None = None
    """speculative: who drafts: the first stages (when omitted), quantised copies of them, looked-up n-grams, or what
    measures best."""
    temperature: float = setting(0.0, high=1000)
    """0 is greedy; above, tokens are sampled."""
    top_k: int | None = setting(None)
    """Sample among this many likeliest tokens; 50 when omitted, all when 0."""
    top_p: float | None = setting(None, above=True, high=1)
    """Sample among the likeliest tokens of this total probability."""
    seed: int | None = None
    """Seed of the sampling; 0 when omitted."""

    def __post_init__(self) -> None:
        """Raise UserError for an option that would do nothing."""
        require_read("generate", self.mode, self)
        for name in ("top_k", "top_p", "seed"):
            if getattr(self, name) is not None and self.temperature == 0:
                raise UserError(
                    f"generate: {_flag(name)} does nothing at --temperature 0, which is greedy: leave it out, or "
                    "give a temperature above 0"
                )


@dataclass(frozen=True)
class ServerOptions:
    """Where to listen, and how the served model answers."""

    mode: Literal["full", "prefix", "stage", "exit", "wand", "speculative"] | None = None
    """Mode that answers; what the release's generation config says when omitted."""
    stages: int | None = setting(None, low=1, high=1024)
    """For mode prefix: how many stages; 1 when omitted."""
    stage: int | None = setting(None, high=1023)
    """For modes stage and speculative: which stage speaks or drafts, counted from 0; the first when omitted."""
    layer: int | None = setting(None, low=1, high=1023)
    """For modes exit and speculative: the exit behind this many layers answers, or drafts instead of a stage."""
    drafter: Drafter | None = None
    """For mode speculative: who drafts; what measures best when omitted."""
    k_draft: int | None = setting(None, low=1, high=1024)
    """For mode speculative: drafts per round; 7 when omitted."""
    host: str = "localhost"
    """Address to listen at."""
    port: int = setting(8000, low=1, high=65_535)
    """Port to listen at."""
    allow_host: tuple[str, ...] = ()
    """Further names that clients may know this server by, beside --host and those of this machine itself; * for any."""
    api_key: str | None = None
    """Key that requests must bring, as Authorization: Bearer KEY; none is asked for when omitted."""
    batch: int = setting(32, low=1, high=1024)
    """Answers that decode at once, in blocks of 8."""
    queue: int = setting(256, low=1, high=1_000_000)
    """Answers that may wait; further requests are told to come back."""
    device: str = "auto"
    """Where the model runs, such as cuda:0."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the weights; that of the release when auto."""

    def __post_init__(self) -> None:
        """Raise UserError for an option that would do nothing."""
        require_read("serve", self.mode, self)


def require_read(command: str, mode: str | None, options: object) -> None:
    """Raise UserError for the first option of another mode that is given, and for a missing or a second place to exit.

    No mode is that of the release.
    """
    for name in sorted({name for names in READS.values() for name in names}):
        if getattr(options, name, None) is not None and name not in READS.get(mode or "", ()):
            readers = " or ".join(f"--mode {other}" for other, names in READS.items() if name in names)
            where = f"with --mode {mode}" if mode else "without --mode"
            raise UserError(f"{command}: {_flag(name)} does nothing {where}: leave it out, or give {readers}")
    if getattr(options, "guarantee", None) is not None and getattr(options, "safety", None) is not None:
        raise UserError(f"{command}: --guarantee and --safety both say when to exit: give one of them")
    stage, layer = (getattr(options, name) for name in ("stage", "layer"))
    if mode == "exit" and layer is None:
        raise UserError(f"{command}: --mode exit needs --layer, the number of layers before the exit")
    if mode == "speculative" and stage is not None and layer is not None:
        raise UserError(f"{command}: --stage and --layer both say who drafts: give one of them")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
