"""What every generation mode shares: checking what it was asked, and writing down what it answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

from .configuration_cognica_poe import check
from .sampling_cognica_poe import TokenChoice, exact_dtype, uniforms
from .settings_cognica_poe import FILTERS, RARE_FILTERS, SCORES, filters, is_neutral, row_processors


@dataclass(frozen=True)
class GenerationRequest:
    """A checked request; build it with :meth:`build`."""

    ids: torch.Tensor  # prompt ids [B, T] int64 on the model's device, left padded
    lengths: list[int]  # real tokens of every row, without its padding
    max_new_tokens: int  # tokens to generate at most, per row
    eos: frozenset[int]  # ids that end a row
    pad: int  # id that fills a row after its end
    choice: TokenChoice  # how tokens are chosen
    uniforms: torch.Tensor | None  # [B, max_new_tokens, 3] when sampling, see uniforms()
    stopping: StoppingCriteriaList  # further reasons to end a row, stop strings among them; empty for none
    processors: list[LogitsProcessorList]  # of every row, change scores before a token is chosen; empty for none
    streamer: BaseStreamer | None = None  # receives the prompt, then each new column [B] of ids, then end()

    @classmethod
    def build(
        cls,
        model,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        max_new_tokens: int = 64,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        do_sample: bool = False,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        seed: int | None = None,
        stop_strings: str | list[str] | None = None,
        tokenizer=None,
        max_time: float | None = None,
        stopping_criteria: Sequence[StoppingCriteria] | None = None,
        streamer=None,
        **settings,
    ) -> GenerationRequest:
        """Check everything up front, so that a mistake costs no computation.

        Args:
            model: the model that will answer; its configuration gives vocabulary, context and default ids.
            input_ids: prompt ids ``[B, T]``.
            attention_mask: ``[B, T]``, 0 at the left padding and 1 at the text; None when nothing is padded.
            max_new_tokens: tokens to generate at most.
            eos_token_id: id or ids that end a row; the model's own when None, an empty list for none.
            pad_token_id: fills ended rows; the model's own, else the first end token, else 0.
            do_sample: draw tokens instead of taking the most probable one.
            logits_processor: processors as in transformers, asked row by row and before the temperature.
            seed: makes sampling repeatable; taken from torch's global generator when None.
            stop_strings: a row ends with the token that completes one of these; needs ``tokenizer``.
            tokenizer: the tokenizer of the prompts, read only for ``stop_strings``.
            max_time: seconds after which no row goes on, counted from now.
            stopping_criteria: criteria as in transformers, asked row by row after every token; their ``scores`` are
                None.
            streamer: object with ``put`` and ``end`` as in transformers.
            **settings: as in transformers' ``GenerationConfig``: what changes scores (``SCORES`` of the module of
                settings; padding does not count as text), and with ``do_sample`` the filters ``temperature``,
                ``top_k``, ``top_p`` and ``RARE_FILTERS``, of which none is at work unless given.

        Raises:
            ValueError: one line that says what is wrong.
            TypeError: a setting that does not exist here.
        """
        unknown = ", ".join(sorted(settings.keys() - {*SCORES, *FILTERS, *RARE_FILTERS}))
        if unknown:
            raise TypeError(f"the decoding modes got an unexpected keyword argument: {unknown}")
        _check_ids(model, input_ids)
        lengths = _real_lengths(input_ids, attention_mask)
        check(is_int(max_new_tokens) and max_new_tokens >= 1, f"max_new_tokens is {max_new_tokens}; ask for at least 1")
        limit, total = model.config.max_position_embeddings, max(lengths) + max_new_tokens
        much = (
            f"{max(lengths)} prompt tokens and {max_new_tokens} new ones make {total}, more than the context of {limit}"
        )
        check(total <= limit, f"{much}; shorten the prompt or lower max_new_tokens")
        eos = _default(model, "eos_token_id") if eos_token_id is None else eos_token_id
        eos = [] if eos is None else [eos] if isinstance(eos, int) else [int(i) for i in eos]
        pad = _default(model, "pad_token_id") if pad_token_id is None else pad_token_id
        choice = _choice(model, do_sample, {n: settings.get(n) for n in (*FILTERS, *RARE_FILTERS)})
        numbers = None
        if do_sample:
            seed = int(torch.randint(2**62, ())) if seed is None else seed
            numbers = uniforms(seed, len(lengths), max_new_tokens).to(model.device, exact_dtype(model.device))
        ids = input_ids.to(model.device)
        prompts = [row[-length:] for row, length in zip(ids, lengths, strict=True)]
        scores = {name: value for name in SCORES if not is_neutral(name, value := settings.get(name))}
        return cls(
            ids=ids,
            lengths=lengths,
            max_new_tokens=max_new_tokens,
            eos=frozenset(eos),
            pad=pad if pad is not None else eos[0] if eos else 0,
            choice=choice,
            uniforms=numbers,
            stopping=_stopping(stop_strings, tokenizer, max_time, stopping_criteria),
            processors=row_processors(model, prompts, max_new_tokens, eos, scores, logits_processor),
            streamer=streamer,
        )

    def prompt(self, row: int) -> torch.Tensor:
        """Real ids ``[T_row]`` of one row."""
        return self.ids[row, self.ids.shape[1] - self.lengths[row] :]

    def ends(self, row: int, new: Sequence[int]) -> bool:
        """True when the last of a row's ``new`` tokens is the last one it may have."""
        if len(new) == self.max_new_tokens or new[-1] in self.eos:
            return True
        if not self.stopping:
            return False
        text = torch.cat((self.prompt(row), self.ids.new_tensor(new)))
        return bool(self.stopping(text[None], None)[0])


class Transcript:
    """New tokens of every row; it knows when a row has ended and feeds the streamer column by column."""

    def __init__(self, request: GenerationRequest):
        self.request, self.streamed = request, 0
        self.rows: list[list[int]] = [[] for _ in request.lengths]
        self.ended = [False] * len(request.lengths)
        if request.streamer is not None:
            request.streamer.put(request.ids.cpu())

    def extend(self, row: int, tokens: Sequence[int]) -> int:
        """Append ``tokens`` to an open row up to its end token or its limit; returns how many were kept."""
        kept = 0
        for token in tokens:
            if self.ended[row]:
                break
            kept += 1
            self.rows[row].append(token)
            self.ended[row] = self.request.ends(row, self.rows[row])
        self._stream()
        return kept

    def remaining(self, row: int) -> int:
        """Tokens that the row may still receive."""
        return 0 if self.ended[row] else self.request.max_new_tokens - len(self.rows[row])

    @property
    def done(self) -> bool:
        """True when every row has ended."""
        return all(self.ended)

    @property
    def open_rows(self) -> list[bool]:
        """Rows that have not ended."""
        return [not ended for ended in self.ended]

    def uniforms(self, purpose: int, ahead: Sequence[Sequence[int]]) -> torch.Tensor | None:
        """Random numbers ``[B, n]`` for tokens that stand ``ahead[r]`` places behind the next one; None when greedy."""
        numbers = self.request.uniforms
        if numbers is None:
            return None
        places = [[len(row) + i for i in some] for row, some in zip(self.rows, ahead, strict=True)]
        index = torch.tensor(places, device=numbers.device).clamp(max=numbers.shape[1] - 1)
        return numbers[torch.arange(len(places), device=numbers.device)[:, None], index, purpose]

    def processed(self, scores: torch.Tensor, ahead, first: Sequence[int]) -> torch.Tensor:
        """``scores`` ``[B, n, V]`` after the logits processors.

        Lane i of row r stands behind the answer so far and the first ``first[r] + i`` tokens of ``ahead[r]``.
        """
        if not self.request.processors:
            return scores
        scores = scores.clone()
        ahead = ahead.tolist() if isinstance(ahead, torch.Tensor) else ahead
        for row, (start, tokens) in enumerate(zip(first, ahead, strict=True)):
            text = self.request.prompt(row).tolist() + self.rows[row]
            for lane in range(scores.shape[1]):
                before = cast(torch.LongTensor, self.request.ids.new_tensor(text + tokens[: start + lane])[None])
                now = cast(torch.FloatTensor, scores[row, lane][None])
                scores[row, lane] = self.request.processors[row](before, now)[0]
        return scores

    def finish(self) -> torch.Tensor:
        """Close the streamer and return prompt and new tokens, ``[B, T + new]``, ended rows filled with the pad id."""
        if self.request.streamer is not None:
            self.request.streamer.end()
        ids = self.request.ids
        return torch.cat((ids, pad_rows(self.rows, self.request.pad).to(ids.device)), dim=1)

    def _stream(self) -> None:
        if self.request.streamer is None:
            return
        longest = max(len(row) for row in self.rows)
        open_rows = [len(row) for row, ended in zip(self.rows, self.ended, strict=True) if not ended]
        for column in range(self.streamed, min(open_rows, default=longest)):
            ids = [row[column] if column < len(row) else self.request.pad for row in self.rows]
            self.request.streamer.put(torch.tensor(ids, dtype=torch.int64))
            self.streamed = column + 1


def pad_rows(rows: Sequence[list[int]], fill: int) -> torch.Tensor:
    """Rows of unequal length as one int64 tensor ``[B, n]``, filled up behind their ends."""
    width = max(len(row) for row in rows)
    padded = [row + [fill] * (width - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.int64).view(len(rows), width)


def is_int(value) -> bool:
    """Whether a value is a whole number, which a truth value is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _check_ids(model, ids: torch.Tensor) -> None:
    check(isinstance(ids, torch.Tensor), f"input_ids is a {type(ids).__name__}; pass a tensor [batch, tokens]")
    check(ids.ndim == 2, f"input_ids has shape {list(ids.shape)}; pass [batch, tokens]")
    check(ids.dtype in (torch.int64, torch.int32), f"input_ids has dtype {ids.dtype}; pass integer token ids")
    check(ids.numel() > 0, "the prompt is empty; pass at least one token, such as the BOS token")
    model.check_vocabulary(ids)


def _real_lengths(ids: torch.Tensor, mask: torch.Tensor | None) -> list[int]:
    if mask is None:
        return [ids.shape[1]] * ids.shape[0]
    check(mask.shape == ids.shape, f"attention_mask {list(mask.shape)} does not fit input_ids {list(ids.shape)}")
    real = mask.cpu() != 0
    left_padded = bool((real.int().diff(dim=1) >= 0).all())
    check(left_padded, "attention_mask is not left padded: zeros first, then ones (tokenizer padding_side='left')")
    lengths = real.sum(dim=1).tolist()
    check(min(lengths) > 0, f"the prompt of row {lengths.index(min(lengths))} is empty; pass at least one token")
    return lengths


def _default(model, name: str):
    own = getattr(getattr(model, "generation_config", None), name, None)
    return own if own is not None else getattr(model.config, name, None)


def _stopping(strings: str | list[str] | None, tokenizer, seconds: float | None, criteria) -> StoppingCriteriaList:
    stopping = StoppingCriteriaList(criteria or [])
    if seconds is not None:
        stopping.append(MaxTimeCriteria(max_time=seconds))
    if strings is not None:
        check(tokenizer is not None, "stop_strings needs tokenizer, the tokenizer of the prompts")
        stopping.append(StopStringCriteria(tokenizer, strings))
    return stopping


def _choice(model, do_sample: bool, given: dict) -> TokenChoice:
    asked = [name for name, value in given.items() if value is not None]
    check(do_sample or not asked, f"{', '.join(asked)} needs do_sample=True; without it decoding is greedy")
    temperature, top_k, top_p = (given[name] for name in FILTERS)
    check(temperature is None or temperature > 0, f"temperature is {temperature}; it must be above 0")
    check(top_k is None or (is_int(top_k) and top_k >= 1), f"top_k is {top_k}; it must be at least 1")
    check(top_p is None or 0 < top_p <= 1, f"top_p is {top_p}; it must be in (0, 1]")
    chain = filters(model, given) if do_sample else None
    return TokenChoice(do_sample, 1.0 if temperature is None else float(temperature), top_k, top_p, chain)
