"""Configuration of a Product-of-Experts causal language model (model card, "Architecture details")."""

from __future__ import annotations

import itertools
import math

from transformers import PreTrainedConfig

POE_MODES = ("none", "flat", "hier", "residual_logop")


class CognicaPoEConfig(PreTrainedConfig):
    """Shape and combiner of a model whose trunk is cut into K stages with one prediction head each.

    The fields carry the names of the released card. ``poe_stage_layers`` lists the number of layers of every stage and
    must sum to ``num_hidden_layers``; one stage is an ordinary transformer. Where nanochat changed over 2026 the value
    is a field (``qk_scale``, ``short_window``, ``resid_lambda_init`` ...): a checkpoint of another date loads.

    Raises:
        ValueError: a field contradicts another (stage layers, heads, window pattern, mode).
    """

    model_type = "cognica_poe"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers' Trainer appends to a list

    def __init__(
        self,
        vocab_size: int = 32768,
        hidden_size: int = 2048,
        intermediate_size: int = 12800,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 16,
        num_key_value_heads: int = 8,
        head_dim: int = 128,
        max_position_embeddings: int = 2048,
        window_pattern: str = "SSSL",
        short_window: int | None = None,
        rope_theta: float = 100_000.0,
        hidden_act: str = "relu_squared",
        rms_norm_eps: float = 1e-6,
        logit_softcap: float = 15.0,
        qk_scale: float = 1.2,
        ve_gate_channels: int = 12,
        smear_channels: int = 24,
        resid_lambda_init: tuple[float, float] = (1.15, 1.05),
        x0_lambda_init: tuple[float, float] = (0.20, 0.05),
        attention_in_fp32: bool = True,
        poe_mode: str = "flat",
        poe_alpha: float = 0.0,
        poe_stage_layers: list[int] | None = None,
        per_stage_head: bool = True,
        poe_head_count: int | None = None,
        poe_wand_p99_bounds_per_stage_head: list[float] | None = None,
        use_cache: bool = True,
        **kwargs,
    ):
        stages = list(poe_stage_layers) if poe_stage_layers is not None else [num_hidden_layers]
        check(poe_mode in POE_MODES, f"poe_mode is {poe_mode!r}; choose one of {', '.join(POE_MODES)}")
        check(
            all(count > 0 for count in stages) and sum(stages) == num_hidden_layers,
            f"poe_stage_layers {stages} must be positive and sum to num_hidden_layers = {num_hidden_layers}",
        )
        check(
            num_attention_heads % num_key_value_heads == 0,
            f"num_attention_heads {num_attention_heads} is not a multiple of num_key_value_heads {num_key_value_heads}",
        )
        check(head_dim % 2 == 0, f"head_dim {head_dim} must be even (rotary halves)")
        check(
            bool(window_pattern) and set(window_pattern) <= {"S", "L"},
            f"window_pattern {window_pattern!r} may hold only S (short) and L (long)",
        )
        check(hidden_act == "relu_squared", f"hidden_act {hidden_act!r} is not supported; use relu_squared")
        check(
            hidden_size >= max(ve_gate_channels, smear_channels),
            f"hidden_size {hidden_size} is below the gate channels ({ve_gate_channels}, {smear_channels})",
        )
        check(
            poe_head_count in (None, len(stages)),
            f"poe_head_count {poe_head_count} differs from the {len(stages)} stages of poe_stage_layers",
        )
        bounds = poe_wand_p99_bounds_per_stage_head
        check(
            bounds is None or len(bounds) == len(stages) - 1,
            f"poe_wand_p99_bounds_per_stage_head needs {len(stages) - 1} bounds, one per transition between stages",
        )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self.window_pattern = window_pattern
        self.short_window = short_window or math.ceil(max_position_embeddings / 4 / 128) * 128
        self.rope_theta = rope_theta
        self.hidden_act = hidden_act
        self.rms_norm_eps = rms_norm_eps
        self.logit_softcap = logit_softcap
        self.qk_scale = qk_scale
        self.ve_gate_channels = ve_gate_channels
        self.smear_channels = smear_channels
        self.resid_lambda_init = list(resid_lambda_init)
        self.x0_lambda_init = list(x0_lambda_init)
        self.attention_in_fp32 = attention_in_fp32
        self.poe_mode = poe_mode
        self.poe_alpha = poe_alpha
        self.poe_stage_layers = stages
        self.per_stage_head = per_stage_head
        self.poe_head_count = len(stages)
        self.poe_wand_p99_bounds_per_stage_head = list(bounds) if bounds is not None else None
        self.use_cache = use_cache
        # What the mask helpers of transformers read: a query sees itself and short_window tokens before it.
        self.sliding_window = self.short_window + 1
        pattern = [window_pattern[i % len(window_pattern)] for i in range(num_hidden_layers)]
        pattern[-1] = "L"  # the last layer always sees everything
        self.layer_types = ["sliding_attention" if kind == "S" else "full_attention" for kind in pattern]
        for derived in ("sliding_window", "layer_types"):
            kwargs.pop(derived, None)
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

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

    def has_value_embedding(self, layer: int) -> bool:
        """Value embeddings sit on every other layer, the last one included."""
        return layer % 2 == (self.num_hidden_layers - 1) % 2


def check(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)
