"""A release that answers requests: its tokenizer, its mode, and how a request becomes answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cognica_poe.data.documents import text_problem
from cognica_poe.errors import UserError
from cognica_poe.modeling.request_cognica_poe import GenerationRequest
from cognica_poe.serving.answers import Answer, Likely, Piece, Text, likely
from cognica_poe.serving.batching import Pool, Scheduler, SoloStreamer, solo_of
from cognica_poe.serving.options import ServerOptions
from cognica_poe.serving.protocol import ChatRequest, CompletionRequest


class Refused(Exception):
    """A request that cannot be answered; the text says why."""


@dataclass(frozen=True)
class Prompt:
    """Ids of a prompt, with its text."""

    ids: list[int]
    text: str


class Answering:
    """A loaded release.

    Args:
        model, tokenizer: as loaded.
        options: the mode that answers.
    """

    def __init__(self, model: Any, tokenizer: Any, options: ServerOptions):
        self.model, self.tokenizer = model, tokenizer
        self.mode, solo, pool = options.mode or "full", None, None
        if model.config.poe_mode == "none":
            raise UserError("serve: the release was trained on the plain path (poe_mode none), which is not served")
        if self.mode in ("wand", "speculative"):
            solo = solo_of(self._speculate if self.mode == "speculative" else self._leave_early)
        else:
            pool = _pool(model, options)
        self.drafting = _drafting(model, options)
        self.scheduler = Scheduler(model, pool, solo, options.batch, options.queue)
        self.context: int = model.config.max_position_embeddings
        if solo is not None:
            self._try_out()

    # ---- requests to answers --------------------------------------------------------------------------------------

    def prompts(self, request: CompletionRequest | ChatRequest) -> list[Prompt]:
        """Prompts of a request as ids. Raises Refused."""
        if isinstance(request, ChatRequest):
            return [self._conversation(request)]
        found = []
        for prompt in request.prompts:
            if isinstance(prompt, str):
                _require_text(prompt)
                names = {} if request.parse_special_tokens else {"split_special_tokens": True}
                ids = self.tokenizer(prompt, **names)["input_ids"]
                found.append(Prompt(ids or [self.tokenizer.bos_token_id], prompt))
            else:
                if max(prompt) >= self.model.config.vocab_size:
                    size = self.model.config.vocab_size
                    raise Refused(f"prompt: token {max(prompt)} does not exist, the vocabulary has {size}")
                found.append(Prompt(prompt, self.tokenizer.decode(prompt, skip_special_tokens=True)))
        return found

    def answer(
        self,
        request: CompletionRequest | ChatRequest,
        prompt: Prompt,
        choice: int,
        emit: Callable[[Piece], None],
    ) -> Answer:
        """One answer to one prompt, not begun. Raises Refused."""
        room = self.context - len(prompt.ids)
        if room < 1:
            raise Refused(f"the prompt has {len(prompt.ids)} tokens and the context {self.context}: shorten it")
        wanted = request.max_tokens or (request.max_completion_tokens if isinstance(request, ChatRequest) else None)
        if wanted is not None and wanted > room:
            raise Refused(
                f"max_tokens is {wanted} behind a prompt of {len(prompt.ids)} tokens, and the context of "
                f"{self.context} has room for {room}: ask for less"
            )
        top = _top(request)
        if top is not None and self.scheduler.pool is None:
            raise Refused(f"logprobs are not served by --mode {self.mode}, only by full, prefix, stage and exit")
        try:
            processors = request.processors(self.model.config.vocab_size, len(prompt.ids))
            options = {**request.options(choice, processors), "max_new_tokens": wanted or room}
            ids = torch.tensor([prompt.ids], device=self.model.device)
            built = GenerationRequest.build(self.model, ids, **options)
        except ValueError as error:
            raise Refused(str(error)) from error
        return Answer(built, options, Text(self.tokenizer, request.stops), top, emit)

    def echo(self, prompt: Prompt, top: int | None) -> list[Likely | None]:
        """Log-probabilities of a prompt's own tokens, none of the first; empty unless wanted."""
        if top is None or self.scheduler.pool is None:
            return []
        pool, ids = self.scheduler.pool, torch.tensor([prompt.ids], device=self.model.device)
        with torch.no_grad():
            scores = _scores(self.model, ids, pool)
        pairs = zip(scores[:-1], prompt.ids[1:], strict=True)
        return [None, *(likely(row, token, top) for row, token in pairs)]

    # ---- modes that decode one request at a time ------------------------------------------------------------------

    def _speculate(self, answer: Answer, streamer: SoloStreamer, criteria: list[Any]) -> dict[str, Any]:
        shared = {"streamer": streamer, "stopping_criteria": criteria, **answer.options}
        _, facts = self.model.generate_speculative(
            answer.request.ids, return_acceptance=True, **self.drafting, **shared
        )
        return {name: facts[name] for name in ("proposed", "accepted", "rounds")}

    def _leave_early(self, answer: Answer, streamer: SoloStreamer, criteria: list[Any]) -> dict[str, Any]:
        shared = {"streamer": streamer, "stopping_criteria": criteria, **answer.options}
        _, used = self.model.generate_wand(answer.request.ids, return_stages_used=True, **shared)
        return {"mean_stages_used": used[used > 0].double().mean().item()}

    def _try_out(self) -> None:
        """Decode a token: whatever a mode lacks is found here, and drafters are measured. Raises UserError."""
        ids = torch.tensor([[self.tokenizer.bos_token_id]], device=self.model.device)
        try:
            if self.mode == "wand":
                self.model.generate_wand(ids, max_new_tokens=1)
            else:
                self.model.generate_speculative(ids, max_new_tokens=1, **self.drafting)
        except ValueError as error:
            raise UserError(f"serve --mode {self.mode}: {error}") from error

    def _conversation(self, request: ChatRequest) -> Prompt:
        if not getattr(self.tokenizer, "chat_template", None):
            raise Refused("this release has no chat template: it continues text, ask /v1/completions")
        for message in request.messages:
            _require_text(message.content)
        messages = [message.model_dump(exclude_none=True) for message in request.messages]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return Prompt(self.tokenizer(text, add_special_tokens=False)["input_ids"], text)


def _require_text(text: str) -> None:
    """Raise Refused for what is no text: half of a surrogate pair."""
    if text_problem(text) == "not utf-8":
        raise Refused("the prompt is not UTF-8 text: it holds half of a surrogate pair")


def _top(request: CompletionRequest | ChatRequest) -> int | None:
    """How many likely tokens to tell beside each; None for no log-probabilities."""
    if isinstance(request, ChatRequest):
        return (request.top_logprobs or 0) if request.logprobs else None
    return request.logprobs


def _pool(model: Any, options: ServerOptions) -> Pool:
    """Whose product answers. Raises UserError for a stage or an exit that does not exist."""
    config, (mode, stages) = model.config, (options.mode or "full", options.stages)
    try:
        if mode == "exit":
            model.find_exit(options.layer)
            return Pool((config.poe_cuts.index(options.layer),), 0.0)
        if mode == "stage":
            model.check_stages([options.stage or 0], "stage", options.stage or 0)
            return Pool((config.stage_segments[options.stage or 0],), 0.0)
        count = config.num_stages if mode == "full" else 1 if stages is None else stages
        model.check_stages([count - 1], "stages", count)
    except ValueError as error:
        raise UserError(f"serve --mode {mode}: {error}") from error
    return Pool(tuple(config.stage_segments[:count]), config.poe_alpha)


def _drafting(model: Any, options: ServerOptions) -> dict[str, Any]:
    """Keywords of ``generate_speculative`` that say who drafts. Raises UserError for who does not exist."""
    if options.mode != "speculative":
        return {}
    try:
        if options.layer is not None:
            model.find_exit(options.layer, "layer")
        else:
            model.check_stages([options.stage or 0], "stage", options.stage or 0)
    except ValueError as error:
        raise UserError(f"serve --mode speculative: {error}") from error
    who = {"draft_stage": options.stage or 0} if options.layer is None else {"draft_layer": options.layer}
    return {**who, "drafter": options.drafter or "auto", "k_draft": 7 if options.k_draft is None else options.k_draft}


def _scores(model: Any, ids: torch.Tensor, pool: Pool) -> torch.Tensor:
    """Log-probabilities ``[T, V]`` of what answers at every token of ids ``[1, T]``."""
    from cognica_poe.modeling.sampling_cognica_poe import combine

    config, logits = model.config, []
    for segment in pool.heads:
        cut = config.poe_cuts[segment]
        if segment in config.stage_segments:
            stage = config.stage_segments.index(segment)
            states = model.boundary_states(ids, max_stages=stage + 1)[0]
            logits.append(model.stage_head(states[stage + 1], stage))
        else:
            logits.append(model.forward_exit(ids, cut))
    return combine(logits, pool.alpha)[0]
