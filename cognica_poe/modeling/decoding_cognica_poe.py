"""Generation modes of a Product-of-Experts model (model card, "PoE-specific inference").

Common keyword arguments of all modes: ``attention_mask`` (left padding), ``max_new_tokens=64``, ``eos_token_id``,
``pad_token_id``, ``do_sample=False``, ``temperature``, ``top_k``, ``top_p``, ``repetition_penalty``,
``logits_processor``, ``seed``, ``stop_strings`` with ``tokenizer``, ``stopping_criteria``, ``streamer``; they are
described at :meth:`GenerationRequest.build`.

All modes take prompts ``input_ids`` ``[B, T]`` and return ``[B, T + new]`` int64; rows that end early are filled with
the pad id. All raise ValueError for a wrong request and for stages, weights, bounds or drafters that do not exist or
fit. A model of one stage runs every mode, each being the full model; a model with ``poe_mode = "none"`` has untrained
stage heads and answers through ``generate()`` alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from transformers import GenerationMixin

from .configuration_cognica_poe import CognicaPoEConfig, check
from .drafting_cognica_poe import DRAFTERS
from .engine_cognica_poe import Engines
from .graphs_cognica_poe import has_compiler
from .loops_cognica_poe import decode_pool, decode_wand
from .request_cognica_poe import GenerationRequest, is_int, pad_rows
from .speculation_cognica_poe import decode_speculative

MODES = {
    "full": "generate_prefix",
    "prefix": "generate_prefix",
    "stage": "generate_stage",
    "wand": "generate_wand",
    "speculative": "generate_speculative",
    "parallel": "generate_parallel_composition",
}
"""Method of every ``poe_mode``."""

SAMPLING = ("temperature", "top_k", "top_p")
SHARED = ("do_sample", "repetition_penalty", "eos_token_id", "pad_token_id", "max_new_tokens", "stop_strings")
PASSED = ("attention_mask", "streamer", "tokenizer", "stopping_criteria", "logits_processor", "seed")
IGNORED = ("use_cache", "cache_implementation", "position_ids", "token_type_ids", "custom_generate", "synced_gpus")
UNSUPPORTED = {"num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False, "min_p": None}
"""Settings of transformers that the modes do not have, with the value that asks for nothing."""


class PoEDecodingMixin(GenerationMixin):
    """The modes beside ``generate()``, which samples the pool of all stages."""

    config: CognicaPoEConfig
    lm_head: nn.Linear

    POE_WAND_P99_BOUNDS_PER_STAGE_HEAD = (3.2557, 1.5259, 1.1327)
    """Bounds of the 3B release at step 14,000: the fallback of four-stage models whose config has none."""

    def prepare_decoding(self, compile: bool = False, width: int | None = None) -> None:
        """Choose how the modes run; takes effect at the next call, which arranges the weights anew.

        The arranged weights hang on this object: a copy starts with none, and with the default settings.

        Args:
            compile: run decode steps as compiled graphs. Each is made when first needed, in tens of seconds, and on a
                processor kept on disk for the next process; :meth:`decoding_seconds_compiled` sums the waiting.
            width: lanes of every decode step. Plain decoding and speculation agree bit for bit at the same width; 1 is
                fastest for plain decoding alone. :func:`natural_width` when None.

        Raises:
            ValueError: a width below 1, or no compiler to compile with.
        """
        check(width is None or width >= 1, f"width is {width}; a decode step has at least 1 lane")
        works = not compile or self.lm_head.weight.device.type != "cpu" or has_compiler()
        check(works, "compile=True needs a C++ compiler (g++ or clang++): install one, or leave it out")
        Engines.attached(self).configure(width, compile)

    def decoding_seconds_compiled(self) -> float:
        """Seconds spent compiling decode steps, or loading them from disk, since the weights were arranged."""
        return sum(engine.graphs.seconds for engine in Engines.attached(self).made.values() if engine.graphs)

    def generate(  # type: ignore[override]  # what transformers takes by position comes by keyword here
        self, inputs: torch.Tensor | None = None, generation_config=None, poe_mode: str | None = None, **kwargs
    ):
        """transformers' ``generate``, which samples the pool, and through ``poe_mode`` every mode of this class.

        Args:
            inputs: prompts ``[B, T]``; ``input_ids`` as a keyword serves as well.
            generation_config: as in transformers. It may itself hold ``poe_mode`` and ``poe_options``, which is how
                ``pipeline`` and ``cognica-poe serve`` reach the modes of a released folder.
            poe_mode: ``full``, ``prefix``, ``stage``, ``wand``, ``speculative`` or ``parallel``; None, unless the
                generation config says otherwise, is transformers' own loop.
            **kwargs: as in transformers; with a mode also ``poe_options``, a dict with that mode's own arguments.

        Raises:
            ValueError: no such mode, an option that the modes do not have, a wrong request, or weights that the modes
                cannot take, such as those under an unmerged adapter (see :func:`plain_weights`).
        """
        config = generation_config if generation_config is not None else self.generation_config
        mode, options = poe_mode, kwargs.pop("poe_options", None)
        if mode is None:
            mode = getattr(config, "poe_mode", None)
            options = getattr(config, "poe_options", None) if options is None else options
        if mode is None:
            # transformers declares self as a class that exists for type checkers alone
            return super().generate(inputs, generation_config=generation_config, **kwargs)  # type: ignore[misc]
        return _run_mode(self, mode, options or {}, inputs, config, kwargs)

    @torch.no_grad()
    def generate_prefix(self, input_ids: torch.Tensor, max_stages: int | None = None, **options) -> torch.Tensor:
        """Pool of the first ``max_stages`` stages; deeper layers are never run. All stages when None."""
        max_stages = self.config.num_stages if max_stages is None else max_stages
        self._check_trained([max_stages - 1], "max_stages", max_stages)
        request = GenerationRequest.build(self, input_ids, **options)
        return decode_pool(self, request, range(max_stages), None, self.config.poe_alpha).finish()

    @torch.no_grad()
    def generate_stage(self, input_ids: torch.Tensor, stage: int, **options) -> torch.Tensor:
        """One stage with its own head, counted from 0; deeper layers are never run."""
        self._check_trained([stage])
        request = GenerationRequest.build(self, input_ids, **options)
        return decode_pool(self, request, [stage], None, 0.0).finish()

    @torch.no_grad()
    def generate_wand(
        self,
        input_ids: torch.Tensor,
        safety: float = 1.0,
        p99_bounds: Sequence[float] | None = None,
        return_stages_used: bool = False,
        **options,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Adaptive depth: a token leaves after stage k when ``top1 - top2 > safety * sum of the remaining bounds``.

        Margins are those of the pooled log-probabilities of the first k stages.

        Args:
            safety: factor on the bounds; larger means fewer exits.
            p99_bounds: K-1 bounds, one per transition between stages; the config's when None.
            return_stages_used: also return how many stages each new token used.

        Returns:
            ids ``[B, T + new]``; with ``return_stages_used`` also int64 ``[B, new]`` in 1..K, 0 after a row's end.
        """
        self._check_trained([0])
        bounds = self._wand_bounds(p99_bounds, safety)
        request = GenerationRequest.build(self, input_ids, **options)
        transcript, used = decode_wand(self, request, bounds, safety)
        ids = transcript.finish()
        return (ids, pad_rows(used, 0).to(ids.device)) if return_stages_used else ids

    @torch.no_grad()
    def generate_speculative(
        self,
        input_ids: torch.Tensor,
        draft_stage: int = 0,
        k_draft: int = 4,
        return_acceptance: bool = False,
        drafter: str = "stage",
        draft_confidence: float = 0.0,
        **options,
    ) -> torch.Tensor | tuple[torch.Tensor, dict]:
        """A cheap drafter proposes up to ``k_draft`` tokens, the full pool verifies them in one block.

        Greedy output is that of plain decoding, sampled output follows exactly its distribution, whatever drafts.

        Args:
            draft_stage: deepest stage that drafts.
            k_draft: drafts per round at most.
            return_acceptance: also return what the drafts were worth.
            drafter: ``stage``, ``int8``, ``int4`` or ``lookup``, see the module of drafters; ``auto`` measures them on
                this machine at the first call and takes the fastest, or none where speculation does not pay; it then
                chooses ``k_draft`` as well.
            draft_confidence: a row stops drafting with the first token whose draft probability is below this.

        Returns:
            ids ``[B, T + new]``; with ``return_acceptance`` also a dict with ``proposed`` and ``accepted`` drafts,
            their quotient ``acceptance`` (0 when nothing was proposed) and the number of verification ``rounds``,
            summed over rows.
        """
        self._check_trained([draft_stage], "draft_stage")
        check(is_int(k_draft) and k_draft >= 1, f"k_draft is {k_draft}; draft at least 1 token")
        known = (*DRAFTERS, "auto")
        check(drafter in known, f"drafter {drafter!r} does not exist; choose one of {', '.join(known)}")
        check(0 <= draft_confidence < 1, f"draft_confidence is {draft_confidence}; it must be in [0, 1)")
        request = GenerationRequest.build(self, input_ids, **options)
        transcript, counts = decode_speculative(self, request, draft_stage, k_draft, drafter, draft_confidence)
        ids = transcript.finish()
        return (ids, counts.as_dict()) if return_acceptance else ids

    @torch.no_grad()
    def generate_parallel_composition(
        self,
        input_ids: torch.Tensor,
        stages: Sequence[int],
        stage_weights: Sequence[float] | None = None,
        **options,
    ) -> torch.Tensor:
        """Pool of chosen stages: ``sum_k w_k log p_k``, renormalised.

        Args:
            stages: stages counted from 0, each at most once; layers above the deepest are never run.
            stage_weights: one non-negative weight per stage, taken as given; uniform (with the model's
                ``poe_alpha``, as the full pool) when None.
        """
        stages = list(stages)
        self._check_trained(stages, "stages", stages)
        if stage_weights is not None:
            stage_weights = [float(weight) for weight in stage_weights]
            fits = len(stage_weights) == len(stages) and all(0 <= w < math.inf for w in stage_weights)
            fits = fits and sum(stage_weights) > 0
            check(fits, f"stage_weights {stage_weights} need one non-negative weight per stage of {stages}")
        request = GenerationRequest.build(self, input_ids, **options)
        alpha = self.config.poe_alpha if stage_weights is None else 0.0
        return decode_pool(self, request, stages, stage_weights, alpha).finish()

    def check_stages(self, stages: list[int], name: str = "stage", value: object = None) -> None:
        """Raise ValueError unless ``stages`` are different ones of the K stages; the message speaks of ``value``."""
        K, integers = self.config.num_stages, all(is_int(stage) for stage in stages)
        twice = integers and len(set(stages)) < len(stages)
        check(not twice, f"{name} {value} names a stage twice; name each stage once, with a weight")
        exist = bool(stages) and integers and min(stages) >= 0 and max(stages) < K
        value = stages[0] if value is None else value
        check(exist, f"{name} {value} does not exist: the model has {K} stages")

    def _check_trained(self, stages: list[int], name: str = "stage", value: object = None) -> None:
        trained = self.config.poe_mode != "none"
        check(trained, "poe_mode is none: the stage heads of this model are not trained; use generate()")
        self.check_stages(stages, name, value)

    def _wand_bounds(self, bounds: Sequence[float] | None, safety: float) -> list[float]:
        K = self.config.num_stages
        bounds = self.config.poe_wand_p99_bounds_per_stage_head if bounds is None else bounds
        if bounds is None:
            how = f"pass p99_bounds with {K - 1} values, or calibrate the model so that its config has "
            check(K in (1, 4), f"no WAND bounds for {K} stages: {how}poe_wand_p99_bounds_per_stage_head")
            bounds = self.POE_WAND_P99_BOUNDS_PER_STAGE_HEAD if K == 4 else ()
        bounds = [float(bound) for bound in bounds]
        fits = len(bounds) == K - 1 and all(bound >= 0 for bound in bounds)
        check(fits, f"p99_bounds {bounds} need {K - 1} non-negative values, one per transition between stages")
        check(safety >= 0, f"safety is {safety}; it must not be negative")
        return bounds


def _run_mode(model, mode: str, options: dict, inputs: torch.Tensor | None, config, kwargs: dict) -> torch.Tensor:
    """Answer a call of ``generate()``: ``options`` are the mode's own, ``kwargs`` the call's, which beat ``config``."""
    check(mode in MODES, f"poe_mode {mode!r} does not exist; choose one of {', '.join(MODES)}")
    ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
    if ids is None:
        raise ValueError("generate() needs input_ids: [batch, tokens]")
    given = {name: kwargs.pop(name, getattr(config, name, None)) for name in (*SHARED, *SAMPLING, *UNSUPPORTED)}
    max_length = kwargs.pop("max_length", None)
    passed = {name: kwargs.pop(name) for name in PASSED if kwargs.get(name) is not None}
    unknown = [name for name, value in kwargs.items() if value is not None and name not in IGNORED]
    unknown += [name for name, nothing in UNSUPPORTED.items() if given.pop(name) not in (nothing, None)]
    check(not unknown, f"poe_mode {mode!r} does not know {', '.join(unknown)}; leave it out, or poe_mode itself")
    if given["max_new_tokens"] is None:
        given["max_new_tokens"] = max_length - ids.shape[1] if max_length else _room(model, ids, config)
    if not given["do_sample"]:  # a config may hold both; greedy decoding asks for no temperature
        given = {name: value for name, value in given.items() if name not in SAMPLING}
    elif given["top_k"] == 0:  # transformers' way to say all tokens
        given["top_k"] = None
    given = {name: value for name, value in given.items() if value is not None}
    return getattr(model, MODES[mode])(ids, **options, **given, **passed)


def _room(model, ids: torch.Tensor, config) -> int:
    """New tokens when nobody says how many: the config's ``max_length``, at most what the context holds."""
    limit = model.config.max_position_embeddings
    longest = min(getattr(config, "max_length", None) or 20 + ids.shape[1], limit)
    return max(longest - ids.shape[1], 1)
