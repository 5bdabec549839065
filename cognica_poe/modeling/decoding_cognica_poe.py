"""Generation modes of a Product-of-Experts model (model card, "PoE-specific inference").

Common keyword arguments of all modes: ``attention_mask`` (left padding), ``max_new_tokens=64``, ``eos_token_id``,
``pad_token_id``, ``do_sample=False``, ``seed``, ``stop_strings`` with ``tokenizer``, ``max_time``,
``logits_processor``, ``stopping_criteria``, ``streamer``, and the settings of transformers that change scores or filter
a distribution; they are described at :meth:`GenerationRequest.build`.

All modes take prompts ``input_ids`` ``[B, T]`` and return ``[B, T + new]`` int64; rows that end early are filled with
the pad id. All raise ValueError for a wrong request and for stages, weights, bounds or drafters that do not exist or
fit. A model of one stage runs every mode, each being the full model; a model with ``poe_mode = "none"`` has untrained
stage heads and answers through ``generate()`` alone.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.generation import GenerateDecoderOnlyOutput

from .configuration_cognica_poe import CognicaPoEConfig, check
from .drafting_cognica_poe import DRAFTERS
from .engine_cognica_poe import Engines
from .graphs_cognica_poe import has_compiler
from .loops_cognica_poe import decode_pool, decode_wand
from .margins_cognica_poe import leaving_margins
from .request_cognica_poe import GenerationRequest, is_int, pad_rows
from .settings_cognica_poe import read_settings
from .speculation_cognica_poe import decode_speculative

MODES = {
    "full": "generate_prefix",
    "prefix": "generate_prefix",
    "stage": "generate_stage",
    "exit": "generate_exit",
    "wand": "generate_wand",
    "speculative": "generate_speculative",
    "parallel": "generate_parallel_composition",
}
"""Method of every ``poe_mode``."""


class PoEDecodingMixin(GenerationMixin):
    """The modes beside ``generate()``, which samples the pool of all stages."""

    config: CognicaPoEConfig
    lm_head: nn.Linear

    POE_WAND_P99_BOUNDS_PER_STAGE_HEAD = (3.2557, 1.5259, 1.1327)
    """Bounds of the 3B release at step 14,000: the fallback of four-stage models whose config has none.

    They were measured on another model: ``cognica-poe calibrate`` measures a release's own.
    """

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
            generation_config: as in transformers. It, or the model's own, may hold ``poe_mode``, ``poe_options`` and
                ``seed``, which is how ``pipeline`` and ``cognica-poe serve`` reach the modes of a released folder.
            poe_mode: ``full``, ``prefix``, ``stage``, ``exit``, ``wand``, ``speculative`` or ``parallel``; None, unless
                the generation config says otherwise, is transformers' own loop.
            **kwargs: as in transformers; with a mode also ``poe_options``, a dict with that mode's own arguments, and
                ``seed``. Settings mean what they mean in transformers and have its defaults: sampling is among the 50
                most probable tokens unless ``top_k`` says otherwise.

        Returns:
            ids as the mode's method does, in a ``GenerateDecoderOnlyOutput`` with ``return_dict_in_generate``.

        Raises:
            ValueError: no such mode, an option of another mode, a setting that the modes do not have
                (:func:`read_settings`), a wrong request, or weights that the modes cannot take, such as those under an
                unmerged adapter (see :func:`plain_weights`).
        """
        configs = [generation_config, self.generation_config]
        mode, options = _configured_mode(configs, poe_mode, kwargs.pop("poe_options", None))
        if mode is None:
            check(options is None, "poe_options says how a mode runs: pass poe_mode as well")
            # transformers declares self as a class that exists for type checkers alone
            return super().generate(inputs, generation_config=generation_config, **kwargs)  # type: ignore[misc]
        options = options or {}
        _check_options(self, mode, options)
        arguments, as_dict = read_settings(self, mode, inputs, generation_config, kwargs)
        answer = getattr(self, MODES[mode])(**options, **arguments)
        return _as_dict(answer) if as_dict else answer

    @torch.no_grad()
    def generate_prefix(self, input_ids: torch.Tensor, max_stages: int | None = None, **options) -> torch.Tensor:
        """Pool of the first ``max_stages`` stages; deeper layers are never run. All stages when None."""
        max_stages = self.config.num_stages if max_stages is None else max_stages
        self._check_trained([max_stages - 1], "max_stages", max_stages)
        request = GenerationRequest.build(self, input_ids, **options)
        return decode_pool(self, request, self._heads_of(range(max_stages)), None, self.config.poe_alpha).finish()

    @torch.no_grad()
    def generate_stage(self, input_ids: torch.Tensor, stage: int, **options) -> torch.Tensor:
        """One stage with its own head, counted from 0; deeper layers are never run."""
        self._check_trained([stage])
        request = GenerationRequest.build(self, input_ids, **options)
        return decode_pool(self, request, self._heads_of([stage]), None, 0.0).finish()

    @torch.no_grad()
    def generate_exit(self, input_ids: torch.Tensor, layer: int, **options) -> torch.Tensor:
        """The exit behind ``layer`` layers with its own head; deeper layers are never run."""
        self._check_trained([0])
        segment = self._exit_segment(layer)
        request = GenerationRequest.build(self, input_ids, **options)
        return decode_pool(self, request, [segment], None, 0.0).finish()

    @torch.no_grad()
    def generate_wand(
        self,
        input_ids: torch.Tensor,
        safety: float = 1.0,
        p99_bounds: Sequence[float] | None = None,
        return_stages_used: bool = False,
        exit_bounds: Sequence[float] | None = None,
        guarantee: float | None = None,
        margins: Sequence[float] | None = None,
        **options,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Adaptive depth: a token leaves after stage k when ``top1 - top2 > safety * sum of the remaining bounds``.

        Margins are those of the pooled log-probabilities of the first k stages. At an exit inside stage k they are its
        own, and its bound, on what lies between it and the pool of the stages up to k, adds to the sum.

        Args:
            safety: factor on the bounds; larger means fewer exits.
            p99_bounds: K-1 bounds, one per transition between stages; the config's when None. A model of four stages
                whose config has none falls back to ``POE_WAND_P99_BOUNDS_PER_STAGE_HEAD``, those of another model; one
                of another number of stages refuses.
            return_stages_used: also return how many stages each new token used, one that it left at an exit included.
            exit_bounds: one bound per exit, or none at all to pass by the exits; the config's when None.
            guarantee: leave by the margins that were calibrated for this agreement with the full pool, such as 0.99,
                instead of by bounds: at least this share of the tokens is the pool's, behind text like that of the
                calibration. Those of the config's ``poe_agreement_margins``.
            margins: K-1 margins of the caller's own instead, such as the config's ``poe_direct_p99_bounds``.

        Returns:
            ids ``[B, T + new]``; with ``return_stages_used`` also int64 ``[B, new]`` in 1..K, 0 after a row's end.
        """
        self._check_trained([0])
        fallback = self.POE_WAND_P99_BOUNDS_PER_STAGE_HEAD
        stops = leaving_margins(self.config, fallback, safety, p99_bounds, exit_bounds, guarantee, margins)
        request = GenerationRequest.build(self, input_ids, **options)
        transcript, used = decode_wand(self, request, *stops)
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
        draft_layer: int | None = None,
        **options,
    ) -> torch.Tensor | tuple[torch.Tensor, dict]:
        """A cheap drafter proposes up to ``k_draft`` tokens, the full pool verifies them in one block.

        Greedy output is that of plain decoding, sampled output follows exactly its distribution, whatever drafts.

        Args:
            draft_stage: deepest stage that drafts, counted from 0.
            k_draft: drafts per round at most.
            return_acceptance: also return what the drafts were worth.
            drafter: ``stage``, ``int8``, ``int4`` or ``lookup``, see the module of drafters; ``auto`` measures them on
                this machine at the first call and takes the fastest, or none where speculation does not pay; it then
                chooses ``k_draft`` as well.
            draft_confidence: a row stops drafting with the first token whose draft probability is below this.
            draft_layer: draft with the exit behind so many layers instead of a stage, whatever the ``drafter``.

        Returns:
            ids ``[B, T + new]``; with ``return_acceptance`` also a dict with ``proposed`` and ``accepted`` drafts,
            their quotient ``acceptance`` (0 when nothing was proposed) and the number of verification ``rounds``,
            summed over rows.
        """
        self._check_trained([draft_stage], "draft_stage")
        segment = self._heads_of([draft_stage])[0]
        if draft_layer is not None:
            check(draft_stage == 0, f"draft_layer {draft_layer} drafts instead of a stage: leave draft_stage out")
            segment = self._exit_segment(draft_layer, "draft_layer")
        check(is_int(k_draft) and k_draft >= 1, f"k_draft is {k_draft}; draft at least 1 token")
        known = (*DRAFTERS, "auto")
        check(drafter in known, f"drafter {drafter!r} does not exist; choose one of {', '.join(known)}")
        check(0 <= draft_confidence < 1, f"draft_confidence is {draft_confidence}; it must be in [0, 1)")
        request = GenerationRequest.build(self, input_ids, **options)
        transcript, counts = decode_speculative(self, request, segment, k_draft, drafter, draft_confidence)
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
        return decode_pool(self, request, self._heads_of(stages), stage_weights, alpha).finish()

    def check_stages(self, stages: list[int], name: str = "stage", value: object = None) -> None:
        """Raise ValueError unless ``stages`` are different ones of the K stages; the message speaks of ``value``."""
        K, integers = self.config.num_stages, all(is_int(stage) for stage in stages)
        twice = integers and len(set(stages)) < len(stages)
        check(not twice, f"{name} {value} names a stage twice; name each stage once, with a weight")
        exist = bool(stages) and integers and min(stages) >= 0 and max(stages) < K
        value = stages[0] if value is None else value
        check(exist, f"{name} {value} does not exist: the model has {K} stages")

    def find_exit(self, layer: int, name: str = "layer") -> int:
        """Which of ``poe_exit_layers`` stands behind ``layer`` layers. Raises ValueError where none does."""
        exits = self.config.poe_exit_layers
        known = f"exits stand behind {', '.join(map(str, exits))} layers" if exits else "the model has no exits"
        fits = is_int(layer) and layer in exits
        check(fits, f"{name} {layer}: no exit stands there; {known} (cognica-poe add-exit trains one)")
        return exits.index(layer)

    def _heads_of(self, stages: Sequence[int]) -> list[int]:
        """The segments behind which the heads of ``stages`` stand."""
        segments = self.config.stage_segments
        return [segments[stage] for stage in stages]

    def _exit_segment(self, layer: int, name: str = "layer") -> int:
        """The segment behind which an exit stands. Raises ValueError where there is none."""
        self.find_exit(layer, name)
        return self.config.poe_cuts.index(layer)

    def _check_trained(self, stages: list[int], name: str = "stage", value: object = None) -> None:
        trained = self.config.poe_mode != "none"
        check(trained, "poe_mode is none: the stage heads of this model are not trained; use generate()")
        self.check_stages(stages, name, value)


def _configured_mode(configs: list, mode: str | None, options: dict | None) -> tuple[str | None, dict | None]:
    """Mode and options of a call: what was given, else what the first of the ``configs`` that knows of modes holds."""
    held = [(getattr(c, "poe_mode", None), getattr(c, "poe_options", None)) for c in configs if c is not None]
    known, its_options = next((pair for pair in held if pair != (None, None)), (None, None))
    mode = known if mode is None else mode
    # Options belong to the mode that they stand beside.
    return mode, its_options if options is None and known in (None, mode) else options


def _check_options(model, mode: str, options: dict) -> None:
    """Raise ValueError unless ``options`` are those of the mode, all that it needs among them."""
    check(mode in MODES, f"poe_mode {mode!r} does not exist; choose one of {', '.join(MODES)}")
    parameters = _own_parameters(model, mode)
    known = ", ".join(parameters) or "none"
    strange = [name for name in options if name not in parameters]
    for name in strange[:1]:
        owners = [other for other in MODES if name in _own_parameters(model, other)]
        whose = f"it belongs to {' and '.join(owners)}" if owners else "no mode has it"
        raise ValueError(f"poe_mode {mode!r} has no option {name}: {whose}; its options are: {known}")
    missing = [name for name, p in parameters.items() if p.default is p.empty and options.get(name) is None]
    check(not missing, f"poe_mode {mode!r} needs {', '.join(missing)}: pass poe_options with it")


def _own_parameters(model, mode: str) -> dict[str, inspect.Parameter]:
    """What a mode's method takes beside what all take; ``full`` is the prefix of all stages."""
    parameters = inspect.signature(getattr(model, MODES[mode])).parameters
    shared = ("input_ids", "options", "max_stages") if mode == "full" else ("input_ids", "options")
    return {name: parameter for name, parameter in parameters.items() if name not in shared}


def _as_dict(answer) -> GenerateDecoderOnlyOutput | tuple:
    """The answer of a mode with its ids in transformers' dict."""
    if isinstance(answer, tuple):
        return _as_dict(answer[0]), *answer[1:]
    return GenerateDecoderOnlyOutput(sequences=answer)
