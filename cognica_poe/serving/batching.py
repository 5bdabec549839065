"""Requests that wait together decode together, and each gets the text that it would get alone.

Rows come in blocks of fixed size over caches of one capacity. A prompt runs by itself; then its row joins a block and
takes part in the block's steps until its answer ends, beside rows that joined earlier or later. Every kernel therefore
has the same shape whoever else is there, rows do not see each other, and greedy text does not depend on the company.

Early exit and speculation decode one request at a time: how far a row gets there depends on the row.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria

from cognica_poe.analysis.conditions import one_thread
from cognica_poe.modeling.engine_cognica_poe import Engine, Engines
from cognica_poe.modeling.stages_cognica_poe import StageCache
from cognica_poe.serving.answers import Answer, Piece

ROWS = 8
"""Rows of a block. A product for 8 rows costs little more than one for a single row: weights are read once."""


@dataclass(frozen=True)
class Pool:
    """Whose product answers: heads by the segments that they stand behind."""

    heads: tuple[int, ...]
    alpha: float


class Block:
    """Rows that decode together."""

    def __init__(self, engine: Engine, pool: Pool, capacity: int):
        self.engine, self.pool, self.capacity = engine, pool, capacity
        idle = torch.zeros(1, dtype=torch.int64, device=engine.device)
        self.cache = StageCache(engine, [idle] * ROWS, capacity)
        self.answers: list[Answer | None] = [None] * ROWS

    @property
    def free(self) -> int | None:
        """A row that nobody uses."""
        return next((row for row, answer in enumerate(self.answers) if answer is None), None)

    @property
    def busy(self) -> bool:
        """Some row is in use."""
        return any(answer is not None for answer in self.answers)

    def join(self, answer: Answer) -> None:
        """Run a prompt, choose its first token, and give it a row for the rest."""
        heads, alpha = self.pool.heads, self.pool.alpha
        alone = StageCache(self.engine, [answer.request.prompt(0)], self.capacity)
        alone.advance(0, max(heads), [True])
        scores = alone.pool(heads, alone.last_known(), 1, None, alpha)[0, 0]
        token = answer.choose(scores)
        if answer.done:
            return
        row = self.free
        assert row is not None
        self.cache.adopt(row, alone)
        self.answers[row] = answer
        self._append({row: token})

    def step(self) -> None:
        """One more token for every row in use; rows whose answers have ended are free again."""
        rows = [answer is not None for answer in self.answers]
        self.cache.advance(0, max(self.pool.heads), rows)
        scores = self.cache.pool(self.pool.heads, self.cache.last_known(), 1, None, self.pool.alpha)[:, 0]
        chosen = {}
        for row, answer in enumerate(self.answers):
            if answer is None:
                continue
            if not answer.done:
                chosen[row] = answer.choose(scores[row])
            if answer.done:
                self._leave(row)
        self._append({row: token for row, token in chosen.items() if self.answers[row] is not None})

    def drop_cancelled(self) -> None:
        """Free the rows of answers that nobody waits for."""
        for row, answer in enumerate(self.answers):
            if answer is not None and answer.cancelled:
                self._leave(row)

    def _leave(self, row: int) -> None:
        self.answers[row] = None
        self.cache.truncate([1 if row == other else known for other, known in enumerate(self.cache.known)])

    def _append(self, tokens: dict[int, int]) -> None:
        if tokens:
            ids = torch.zeros(ROWS, 1, dtype=torch.int64, device=self.engine.device)
            for row, token in tokens.items():
                ids[row, 0] = token
            self.cache.append(ids, [int(row in tokens) for row in range(ROWS)])


class _Cancelled(StoppingCriteria):
    """Ends a generation that nobody waits for, or whose text is complete."""

    def __init__(self, answer: Answer):
        self.answer = answer

    def __call__(self, input_ids, scores, **kwargs):  # type: ignore[no-untyped-def]  # as transformers'
        return torch.full((len(input_ids),), self.answer.done, dtype=torch.bool)


class Scheduler:
    """A thread that decodes what is submitted.

    Args:
        model: the released model, in evaluation mode.
        pool: who answers; None where ``solo`` does.
        solo: decodes one request by itself: called with the answer, it returns what the mode has to tell.
        rows: rows that may be in use at once.
        waiting: requests that may wait.
    """

    def __init__(
        self, model: Any, pool: Pool | None, solo: Callable[[Answer], None] | None, rows: int = 32, waiting: int = 256
    ):
        self.model, self.pool, self.solo, self.rows = model, pool, solo, rows
        self.waiting: queue.Queue[Answer | None] = queue.Queue(waiting + 1)
        self.most_waiting = waiting
        self.blocks: list[Block] = []
        self.thread = threading.Thread(target=self._work, name="decoding", daemon=True)
        self.closing = False

    def start(self) -> None:
        """Begin to work."""
        self.thread.start()

    def submit(self, answers: Sequence[Answer]) -> bool:
        """Let answers wait for their turn. False when too many wait already: none of them does then."""
        if self.closing or self.waiting.qsize() + len(answers) > self.most_waiting:
            return False
        for answer in answers:
            self.waiting.put(answer)
        return True

    def close(self) -> None:
        """Finish what is under way, and end."""
        self.closing = True
        self.waiting.put(None)
        self.thread.join()

    @property
    def in_use(self) -> int:
        """Rows in use."""
        return sum(answer is not None for block in self.blocks for answer in block.answers)

    def _work(self) -> None:
        small = self.model.device.type == "cpu" and self.model.config.hidden_size <= 512
        with torch.no_grad(), one_thread() if small else contextlib.nullcontext():
            while self._take():
                for block in self.blocks:
                    block.drop_cancelled()
                    if block.busy:
                        self._guarded(block.step, [answer for answer in block.answers if answer is not None], block)

    def _take(self) -> bool:
        """Begin what waits, as far as there are rows; wait for something when nothing is under way. False at the end.

        One prompt at a time where rows are in use, so that their text goes on meanwhile.
        """
        while self.in_use < self.rows:
            busy = self.in_use > 0
            try:
                answer = self.waiting.get(block=not busy)
            except queue.Empty:
                return True
            if answer is None:
                if self.in_use or not self.waiting.empty():
                    self.waiting.put(None)
                    return True
                return False
            if answer.cancelled:
                continue
            if self.solo is not None:
                self._guarded(lambda: self.solo(answer), [answer])  # type: ignore[misc]  # noqa: B023  called at once
                continue
            block = self._block()
            self._guarded(lambda: block.join(answer), [answer])  # noqa: B023  called at once
            if busy:
                return True
        return True

    def _block(self) -> Block:
        """A block with a free row."""
        assert self.pool is not None
        for block in self.blocks:
            if block.free is not None:
                return block
        engine = Engines.of(self.model).get(self.model, segments=max(self.pool.heads) + 1)
        self.blocks.append(Block(engine, self.pool, self.model.config.max_position_embeddings))
        return self.blocks[-1]

    def _guarded(self, work: Callable[[], None], answers: Sequence[Answer], block: Block | None = None) -> None:
        """Work whose failure ends the answers it is for, and the block that it happened in, and nothing else."""
        try:
            work()
        except Exception:  # whatever it is, the other requests go on
            traceback.print_exc()
            if block is not None:
                self.blocks.remove(block)
            for answer in answers:
                if answer.finish is None:
                    answer.finish = "error"
                    answer.emit(Piece("", [], [], "error"))


class SoloStreamer:
    """Hands the tokens of one generation on to its answer, as transformers' streamers do; the last one at the end."""

    def __init__(self, answer: Answer):
        self.answer, self.prompt_seen = answer, False
        self.held: int | None = None

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then one token at a time."""
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        for token in value.flatten().tolist():
            if self.held is not None and not self.answer.done:
                self.answer.take(self.held, [])
            self.held = token

    def end(self) -> None:
        """Nothing more comes; the token held back is told of with what the mode found out."""


def solo_of(generate: Callable[..., Any]) -> Callable[[Answer], None]:
    """A ``solo`` of :class:`Scheduler` by a mode: ``generate(ids, options, streamer, criteria)`` returns facts."""

    def solo(answer: Answer) -> None:
        streamer = SoloStreamer(answer)
        facts = generate(answer, streamer, [_Cancelled(answer)])
        if streamer.held is not None and not answer.done:
            answer.take(streamer.held, [], facts)

    return solo
