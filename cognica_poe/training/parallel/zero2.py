"""ZeRO-2 over any number of ranks: sharded masters, moments and gradients, full replicas for the computation.

Each rank holds ``ceil(rows / world)`` rows of every parameter in fp32 with its optimiser state, and a full replica
(fp32 or bf16) that the model computes with. A step is

1. during the backward passes: gradients are reduce-scattered into row shards (``reduction``);
2. Muon: momentum on the rows, one all-to-all per matrix shape to the owner ranks, Newton-Schulz on whole stacks there,
   one all-to-all back, cautious update of the rows. Owners are chosen by cost, so that ranks work equally long;
3. AdamW on the rows, elementwise, while the matrices travel;
4. replicas are gathered from the rows.

torch's FSDP2 was tried in its place. It shards what is used inside a module's ``forward``, but the stage-by-stage
objective reads heads, embeddings and lambdas directly and runs several backward passes per micro-batch, so that FSDP2
mixes sharded and plain tensors there unless the model knows of it. Here the model stays ignorant.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM
from cognica_poe.recipe.fields import OptimizerRecipe, RanksRecipe
from cognica_poe.training.optim.groups import group_of
from cognica_poe.training.optim.muon import descend, direction, nesterov, second_moment_shape
from cognica_poe.training.optim.optimizer import MuonAdamW, gradient_of
from cognica_poe.training.parallel.exchange import StackExchange
from cognica_poe.training.parallel.ranks import Pending, Ranks
from cognica_poe.training.parallel.reduction import IN_FLIGHT, GradientReducer
from cognica_poe.training.parallel.sharding import Bucket, assign_owners, row_range


class DistMuonAdamW(MuonAdamW):
    """``MuonAdamW`` whose parameters, moments and gradients are spread over ranks: an ``Optimizer``.

    The same weights result.

    Args:
        model: full model, equal on every rank. Its parameters become the replicas.
        recipe, batch_tokens: as for ``MuonAdamW``; ``batch_tokens`` counts all ranks.
        ranks: this process among the others.
        options: how gradients and weights travel.
        sections: parameters in the order in which a backward pass completes them, with the number of additions to each
            (``Objective.sections``); one section with one addition each when omitted.
    """

    def __init__(
        self,
        model: CognicaPoEForCausalLM,
        recipe: OptimizerRecipe,
        batch_tokens: int,
        ranks: Ranks,
        options: RanksRecipe | None = None,
        sections: Sequence[Mapping[str, int]] | None = None,
    ):
        options = options or RanksRecipe()
        self.ranks, self.options = ranks, options
        self.replicas = {name: p for name, p in model.named_parameters() if p.requires_grad}
        masters = {name: nn.Parameter(self._cut(name, p.data)) for name, p in self.replicas.items()}
        if options.replica_dtype == "bfloat16":
            for name, parameter in self.replicas.items():
                masters[name] = nn.Parameter(masters[name].detach().clone())
                if parameter.ndim > 1:  # the few scalars stay exact
                    parameter.data = parameter.data.bfloat16()
                    parameter.grad_dtype = torch.float32  # micro-batches and stages add up in full precision
        super().__init__(model, recipe, batch_tokens, masters)
        sections = sections or [dict.fromkeys(self.replicas, 1)]
        wide = next(iter(masters.values())).dtype  # fp32; fp64 in tests
        reduce_dtype = torch.bfloat16 if options.reduce_dtype == "bfloat16" else wide
        self.reducer = GradientReducer(self.replicas, sections, ranks, options.grad_sync, reduce_dtype)
        self.gathers = list(self._gather_buckets(sections))
        matrices = {name: self.shapes[name] for name in self.replicas if group_of(name) == "muon"}
        self.owners = assign_owners(matrices, ranks.world)
        self.finished = False

    def _cut(self, name: str, full: torch.Tensor) -> torch.Tensor:
        first, last = row_range(full.shape[0], self.ranks.rank, self.ranks.world)
        return full[first:last]

    def _gather_buckets(self, sections: Sequence[Mapping[str, int]]) -> Iterator[Bucket]:
        """Replicas by section and dtype; what never gets a gradient never changes."""
        for section in sections:
            for dtype in dict.fromkeys(self.replicas[name].dtype for name in section):
                names = [name for name in section if self.replicas[name].dtype == dtype]
                if any(section[name] for name in names):
                    yield Bucket({name: self.shapes[name] for name in names}, self.ranks.world)

    # ---- a step ---------------------------------------------------------------------------------------------------

    def arrange(self, sections: Sequence[Mapping[str, int]]) -> None:
        """From the next micro-batch on, a backward pass completes gradients in the order of ``sections``."""
        self.reducer.arrange(sections)

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Wrap the backward pass of every micro-batch; ``last`` marks that of a step. Gradients are summed, so each
        micro-batch of each rank is scaled by its share of the whole batch."""
        return self.reducer.micro_batch(last)

    def finish_gradients(self) -> None:
        """Wait for the summed gradients; they then stand at the rows of this rank, ``parameters[name].grad``."""
        if self.finished:
            return
        for name, rows in self.reducer.collect().items():
            # AdamW skips what has no gradient; an empty shard of a matrix still takes part in the exchange.
            if rows.numel() or group_of(name) == "muon":
                self.parameters[name].grad = rows.to(self.parameters[name].dtype)
        self.finished = True

    def gradients(self) -> list[torch.Tensor]:
        """Summed gradients at this rank's rows, waited for."""
        self.finish_gradients()
        return super().gradients()

    def zero_grad(self) -> None:
        """Drop all gradients, those under way included."""
        super().zero_grad()
        self.reducer.drop()
        self.finished = False

    @torch.no_grad()
    def step(
        self, lr_scale: float, momentum: float, weight_decay_scale: float, keep: torch.Tensor | None = None
    ) -> None:
        """One update of every parameter that has a gradient on any rank; arguments as for ``Optimizer``."""
        self.finish_gradients()
        sent = []
        for shape, names in self._present_stacks().items():
            exchange = StackExchange(shape, names, self.owners, self.ranks)
            ahead = {name: self._look_ahead(name, momentum, keep) for name in names}
            sent.append((shape, exchange, *exchange.to_owners(ahead)))
        self._step_adamw(lr_scale, keep)
        returned = []
        for shape, exchange, arrived, pending in sent:
            pending.wait()
            returned.append((shape, exchange, *exchange.to_shards(self._directions(exchange, arrived, keep))))
        for shape, exchange, arrived, pending in returned:
            pending.wait()
            rates = self._muon_rates(shape, lr_scale, weight_decay_scale)
            for name, update in exchange.shards(arrived).items():
                descend(self.parameters[name], update, *rates)
        self.gather_replicas()

    def _look_ahead(self, name: str, momentum: float, keep: torch.Tensor | None) -> torch.Tensor:
        state = self.muon_state.setdefault(name, {})
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(self.parameters[name])
        return nesterov(gradient_of(self.parameters[name]), state["momentum"], momentum, keep)

    def _directions(self, exchange: StackExchange, arrived: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        """Updates ``[M, rows, cols]`` of the matrices that this rank owns."""
        stack, second = exchange.stack(arrived), None
        if not exchange.mine:
            return stack
        if self.recipe.muon_beta2 < 1.0:
            shape = second_moment_shape(exchange.rows, exchange.cols)
            states = [self.muon_state[name] for name in exchange.mine]
            second = torch.stack([state.get("second_moment", stack.new_zeros(shape)) for state in states])
        beta2, iteration = self.recipe.muon_beta2, self.recipe.muon_iteration
        update = direction(stack, second, beta2, iteration, self.iteration_dtype, keep)
        if second is not None:
            for state, moment in zip(states, second, strict=True):
                state["second_moment"] = moment
        return update

    @torch.no_grad()
    def gather_replicas(self) -> None:
        """Make every rank's replicas from the rows of all ranks."""
        under_way: list[tuple[Bucket, torch.Tensor, Pending]] = []
        for bucket in self.gathers:
            self._finish_gathers(under_way, keep=IN_FLIGHT - 1)
            first = self.replicas[next(iter(bucket.places))]
            line = torch.zeros(bucket.elements, dtype=first.dtype, device=first.device)
            for name in bucket.places:
                bucket.shard(line, name, self.ranks.rank).copy_(self.parameters[name])
            lines = torch.empty(self.ranks.world, bucket.elements, dtype=first.dtype, device=first.device)
            under_way.append((bucket, lines, self.ranks.all_gather(lines, line)))
        self._finish_gathers(under_way, keep=0)

    def _finish_gathers(self, under_way: list[tuple[Bucket, torch.Tensor, Pending]], keep: int) -> None:
        while len(under_way) > keep:
            bucket, lines, pending = under_way.pop(0)
            pending.wait()
            for name in bucket.places:
                bucket.get(lines, name, self.replicas[name].data)

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, torch.Tensor]:
        """This rank's rows of the fp32 masters; joined in rank order they are the weights."""
        return {name: p.detach() for name, p in self.parameters.items() if p.shape[0]}

    def _set_weight(self, name: str, full: torch.Tensor) -> None:
        self.parameters[name].copy_(self._cut(name, full))
        self.replicas[name].copy_(full)

    def own_rows(self, name: str, full: torch.Tensor) -> torch.Tensor:
        """This rank's rows of a whole tensor. Raises ValueError as for ``MuonAdamW``."""
        return self._cut(name, super().own_rows(name, full))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """This rank's pieces of what ``MuonAdamW.state_dict`` holds; joined in rank order they are the same tensors.

        Moments are in row shards, second moments of Muon whole on their owner, step counts on the first rank.
        """
        pieces = super().state_dict()
        return {name: value for name, value in pieces.items() if (value.ndim or self.ranks.is_first) and value.numel()}

    def _restore(self, name: str, key: str, value: torch.Tensor) -> None:
        device = self.parameters[name].device
        if key == "second_moment":
            if self.owners[name] == self.ranks.rank:
                self.muon_state.setdefault(name, {})[key] = value.to(device, copy=True)
        elif group_of(name) == "muon":
            self.muon_state.setdefault(name, {})[key] = self._cut(name, value).to(device, copy=True)
        elif self.parameters[name].numel():
            # The fused kernel reads the step count where the parameter lives, always in fp32.
            dtype, rows = (torch.float32, value) if key == "step" else (value.dtype, self._cut(name, value))
            self.adamw.state[self.parameters[name]][key] = rows.to(device, dtype, copy=True)

    # ---- what a step costs ----------------------------------------------------------------------------------------

    def traffic(self, micro_batches: int) -> dict[str, dict[str, int]]:
        """Collectives of one step and the bytes that one rank hands to them, by kind, from shapes alone.

        ``micro_batches`` are those of one rank. With N ranks, P padded elements of a bucket and e bytes each:
        reduce-scatter ``N P e`` per bucket (and micro-batch, when they are sent every time), all-gather ``P e`` per
        bucket, all-to-all per matrix shape ``rows_here * cols * matrices * 4`` out, ``rows * cols * owned * 4`` back.
        """
        rank, world = self.ranks.rank, self.ranks.world
        sends = micro_batches if self.options.grad_sync == "every_microbatch" else 1
        wide = self.reducer.dtype.itemsize
        sizes = [bucket.elements for bucket in self.reducer.buckets]
        gathered = [b.elements * self.replicas[next(iter(b.places))].dtype.itemsize for b in self.gathers]
        trained = {name for name, count in self.reducer.arrivals.items() if count}
        stacks = {shape: [n for n in names if n in trained] for shape, names in self.stacks.items()}
        stacks = {shape: names for shape, names in stacks.items() if names}
        moved = 0
        for (rows, cols), names in stacks.items():
            first, last = row_range(rows, rank, world)
            owned = sum(self.owners[name] == rank for name in names)
            moved += ((last - first) * len(names) + rows * owned) * cols
        master = next(iter(self.parameters.values())).dtype.itemsize
        return {
            "reduce_scatter": {"count": sends * len(sizes), "bytes": sends * world * sum(sizes) * wide},
            "all_to_all": {"count": 2 * len(stacks), "bytes": moved * master},
            "all_gather": {"count": len(gathered), "bytes": sum(gathered)},
            "all_reduce": {"count": 1, "bytes": len(self.replicas)},
        }
