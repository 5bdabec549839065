"""Configuration of a Product-of-Experts causal language model (model card, "Architecture details")."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from transformers import PreTrainedConfig

POE_MODES = ("none", "flat", "hier", "residual_logop")
FINETUNE_OBJECTIVES = ("pool", "stages", "flat")


class CognicaPoEConfig(PreTrainedConfig):
    """Shape and combiner of a model whose trunk is cut into K stages with one prediction head each.

    The fields carry the names of the released card. ``poe_stage_layers`` lists the number of layers of every stage and
    must sum to ``num_hidden_layers``; one stage is an ordinary transformer. ``poe_exit_layers`` adds exits inside
    stages, each by the number of layers before it: heads that draft and answer alone, and are no experts of the pool.
    Where nanochat changed over 2026 the value is a field (``qk_scale``, ``short_window``, ``resid_lambda_init`` ...): a
    checkpoint of another date loads.

    Raises:
        ValueError: a field contradicts another (stage layers, exits, heads, window pattern, mode).
    """

    model_type = "cognica_poe"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers' Trainer appends to a list

    vocab_size: int = 32768
    hidden_size: int = 2048
    intermediate_size: int = 12800
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 2048
    window_pattern: str = "SSSL"
    short_window: int = 0  # 0 becomes a quarter of the context, in whole 128s
    rope_theta: float = 100_000.0
    hidden_act: str = "relu_squared"
    rms_norm_eps: float = 1e-6
    logit_softcap: float = 15.0
    qk_scale: float = 1.2
    ve_gate_channels: int = 12
    smear_channels: int = 24
    resid_lambda_init: Sequence[float] = (1.15, 1.05)
    x0_lambda_init: Sequence[float] = (0.20, 0.05)
    attention_in_fp32: bool = True
    poe_mode: str = "flat"
    poe_alpha: float = 0.0
    poe_stage_layers: list[int] = None  # type: ignore[assignment]  # None becomes one stage of all layers
    per_stage_head: bool = True
    stage_head_rank: int = 0  # of the stages' own heads; 0: full matrices
    poe_exit_layers: list[int] = None  # type: ignore[assignment]  # layers before each exit; None becomes no exit
    exit_head_rank: int = 0  # of the exits' own heads; 0: full matrices
    poe_head_count: int = None  # type: ignore[assignment]  # None becomes the number of stages
    poe_wand_p99_bounds_per_stage_head: list[float] | None = None
    poe_wand_p99_bounds_per_exit: list[float] | None = None  # None: WAND passes by the exits
    poe_direct_p99_bounds: list[float] | None = None  # margins behind stages 0 .. K-2, of the pool's remaining change
    poe_agreement_margins: dict[str, list[float]] | None = None  # such margins by the agreement that they keep
    finetune_objective: str = "pool"  # what labels teach: the pool, the stages, or each stage by itself
    use_cache: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        stages, bounds = self.poe_stage_layers, self.poe_wand_p99_bounds_per_stage_head
        self.poe_stage_layers = [self.num_hidden_layers] if stages is None else list(stages)
        self.poe_wand_p99_bounds_per_stage_head = None if bounds is None else list(bounds)
        self.poe_exit_layers = [] if self.poe_exit_layers is None else list(self.poe_exit_layers)
        if self.poe_wand_p99_bounds_per_exit is not None:
            self.poe_wand_p99_bounds_per_exit = list(self.poe_wand_p99_bounds_per_exit)
        self._check_fields()
        self.poe_head_count = self.num_stages
        self.resid_lambda_init, self.x0_lambda_init = list(self.resid_lambda_init), list(self.x0_lambda_init)
        self.short_window = self.short_window or math.ceil(self.max_position_embeddings / 4 / 128) * 128
        # What the mask helpers of transformers read: a query sees itself and short_window tokens before it.
        self.sliding_window = self.short_window + 1
        pattern = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.num_hidden_layers)]
        pattern[-1] = "L"  # the last layer always sees everything
        self.layer_types = ["sliding_attention" if kind == "S" else "full_attention" for kind in pattern]
        derived = ("sliding_window", "layer_types")  # stand in a saved configuration
        super().__post_init__(**{name: value for name, value in kwargs.items() if name not in derived})

    def _check_fields(self) -> None:
        stages, layers, bounds = self.poe_stage_layers, self.num_hidden_layers, self.poe_wand_p99_bounds_per_stage_head
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        check(self.poe_mode in POE_MODES, f"poe_mode is {self.poe_mode!r}; choose one of {', '.join(POE_MODES)}")
        taught, known = self.finetune_objective, ", ".join(FINETUNE_OBJECTIVES)
        check(taught in FINETUNE_OBJECTIVES, f"finetune_objective is {taught!r}; choose one of {known}")
        fits = all(count > 0 for count in stages) and sum(stages) == layers
        check(fits, f"poe_stage_layers {stages} must be positive and sum to num_hidden_layers = {layers}")
        check(heads % groups == 0, f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
        check(self.head_dim % 2 == 0, f"head_dim {self.head_dim} must be even (rotary halves)")
        fits = bool(self.window_pattern) and set(self.window_pattern) <= {"S", "L"}
        check(fits, f"window_pattern {self.window_pattern!r} may hold only S (short) and L (long)")
        fits = self.hidden_act == "relu_squared"
        check(fits, f"hidden_act {self.hidden_act!r} is not supported; use relu_squared")
        channels = (self.ve_gate_channels, self.smear_channels)
        fits = self.hidden_size >= max(channels)
        check(fits, f"hidden_size {self.hidden_size} is below the gate channels {channels}")
        rank, fits = self.stage_head_rank, 0 <= self.stage_head_rank < self.hidden_size
        check(fits, f"stage_head_rank {rank} must be 0 (full) or below hidden_size {self.hidden_size}")
        check(self.per_stage_head or not rank, f"stage_head_rank {rank} needs per_stage_head")
        self._check_exits()
        fits, count = self.poe_head_count in (None, len(stages)), len(stages)
        check(fits, f"poe_head_count {self.poe_head_count} differs from the {count} stages of poe_stage_layers")
        fits, count = bounds is None or len(bounds) == len(stages) - 1, len(stages) - 1
        check(fits, f"poe_wand_p99_bounds_per_stage_head needs {count} bounds, one per transition between stages")
        self._check_margins()

    def _check_margins(self) -> None:
        named: dict[str, list[float] | None] = {"poe_direct_p99_bounds": self.poe_direct_p99_bounds}
        for agreement, margins in (self.poe_agreement_margins or {}).items():
            name = f"poe_agreement_margins {agreement!r}"
            check(_is_share(agreement), f"{name} is no agreement; name one between 0 and 1, such as '0.99'")
            named[name] = margins
        for name, held in named.items():
            fits = held is None or (len(held) == self.num_stages - 1 and all(margin >= 0 for margin in held))
            check(fits, f"{name} needs {self.num_stages - 1} non-negative margins, one per stage but the last")

    def _check_exits(self) -> None:
        exits, rank, layers = self.poe_exit_layers, self.exit_head_rank, self.num_hidden_layers
        fits = all(type(layer) is int and 0 < layer < layers for layer in exits) and exits == sorted(set(exits))
        check(fits, f"poe_exit_layers {exits} must ascend from at least 1 to below num_hidden_layers = {layers}")
        ends = set(itertools.accumulate(self.poe_stage_layers))
        at_end = [layer for layer in exits if layer in ends]
        check(not at_end, f"poe_exit_layers {exits}: a stage ends behind layer {at_end[:1]}, which has a head already")
        check(0 <= rank < self.hidden_size, f"exit_head_rank {rank} must be 0 (full) or below {self.hidden_size}")
        bounds = self.poe_wand_p99_bounds_per_exit
        fits = bounds is None or len(bounds) == len(exits)
        check(fits, f"poe_wand_p99_bounds_per_exit needs {len(exits)} bounds, one per exit of poe_exit_layers")
        check(bool(exits) or not rank, f"exit_head_rank {rank} needs poe_exit_layers")

    @property
    def num_stages(self) -> int:
        """K, the number of stages (experts)."""
        return len(self.poe_stage_layers)

    @property
    def poe_stage_boundaries(self) -> list[int]:
        """Index of the last layer of every stage: [15, 21, 26, 31] for layers (16, 6, 5, 5)."""
        return [end - 1 for end in itertools.accumulate(self.poe_stage_layers)]

    def stage_layers(self, stage: int) -> range:
        """Indices of the layers of one stage."""
        end = self.poe_stage_boundaries[stage] + 1
        return range(end - self.poe_stage_layers[stage], end)

    @property
    def poe_cuts(self) -> list[int]:
        """Layers before every head of a stage or an exit, ascending: what lies between two is a segment of layers."""
        return sorted([*itertools.accumulate(self.poe_stage_layers), *self.poe_exit_layers])

    @property
    def stage_segments(self) -> list[int]:
        """The segment that ends every stage; without exits a stage is a segment."""
        cuts = self.poe_cuts
        return [cuts.index(end) for end in itertools.accumulate(self.poe_stage_layers)]

    def segment_layers(self, segment: int) -> range:
        """Indices of the layers of one segment."""
        cuts = [0, *self.poe_cuts]
        return range(cuts[segment], cuts[segment + 1])

    def exits_of(self, stage: int) -> list[int]:
        """Exits inside a stage, as indices of ``poe_exit_layers``."""
        layers = self.stage_layers(stage)
        return [i for i, layer in enumerate(self.poe_exit_layers) if layers.start < layer < layers.stop]

    def has_value_embedding(self, layer: int) -> bool:
        """Value embeddings sit on every other layer, the last one included."""
        return layer % 2 == (self.num_hidden_layers - 1) % 2


def _is_share(text: str) -> bool:
    try:
        return 0.0 < float(text) < 1.0
    except ValueError:
        return False


def check(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)
