"""Steps that must not be applied, and what follows from them."""

import dataclasses
import json
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cognica_poe.recipe.fields import GuardRecipe
from cognica_poe.training.guard import Observation, SpikePolicy, StepGuard
from cognica_poe.training.optim.muon import descend, muon_update

QUICK = GuardRecipe(spike_window=8, spike_sigma=6.0, max_in_a_row=3, max_in_window=4, pass_over=2, max_rollbacks=2)
WIDE = dataclasses.replace(QUICK, spike_window=64)


def gradients(value=1.0):
    return [torch.full((3, 4), value), torch.full((5,), value), torch.zeros(0, 4)]


def watched(recipe=QUICK, steps=8, **kwargs) -> StepGuard:
    """A guard that has seen ``steps`` ordinary steps."""
    guard = StepGuard(recipe, **kwargs)
    for step in range(steps):
        assert guard.check(torch.tensor(3.0 + 0.1 * (step % 3)), gradients(1.0 + 0.05 * (step % 2)))
    return guard


class NoHostRead(TorchDispatchMode):
    """Fails where a value of a tensor would have to wait for the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), function
        return function(*args, **(kwargs or {}))


# ---- the guard ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "first", "last element"])
def test_what_is_not_finite_is_not_applied(bad, where):
    guard = StepGuard(QUICK)
    loss, parts = torch.tensor(2.0), gradients()
    if where == "loss":
        loss = torch.tensor(bad)
    else:
        parts[0 if where == "first" else 1].view(-1)[0 if where == "first" else -1] = bad
    assert not guard.check(loss, parts)
    seen = guard.observation(7).read()
    assert seen.step == 7 and seen.verdict == "non-finite"
    assert guard.check(torch.tensor(2.0), gradients()) and guard.observation(8).read().verdict == "ok"


def test_an_observation_is_loss_and_norm_over_all_ranks():
    """Two ranks with shards of one gradient: the norm is that of the whole, the loss the mean."""
    halves = torch.randn(2, 50)
    both = {"loss": torch.tensor((1.0, 3.0)), "squares": halves.double().square().sum(dim=1)}

    def mean(tensor):
        assert tensor[0] == both["loss"][0] and torch.isclose(tensor[1], both["squares"][0])
        return torch.stack((both["loss"].mean(), both["squares"].mean())).to(tensor)

    guard = StepGuard(QUICK, mean, world=2)
    assert guard.check(both["loss"][0], [halves[0]])
    seen = guard.observation(0).read()
    assert seen.loss == 2.0 and seen.gradient_norm == pytest.approx(float(halves.norm()), rel=1e-6)


def test_gradients_in_bf16_and_large_ones():
    guard = StepGuard(QUICK)
    assert guard.check(torch.tensor(1.0), [torch.full((1000,), 1e15), torch.full((1000,), 1e15)])
    assert guard.observation(0).read().gradient_norm == pytest.approx(1e15 * 2000**0.5, rel=1e-6)
    part = torch.randn(4096, dtype=torch.bfloat16)
    assert guard.check(torch.tensor(1.0), [part])
    assert guard.observation(1).read().gradient_norm == pytest.approx(float(part.float().norm()), rel=1e-5)


@pytest.mark.parametrize(("loss", "scale"), [(9.0, 1.0), (3.1, 50.0)])
def test_a_spike_of_loss_or_gradient_is_left_out(loss, scale):
    guard = watched()
    assert not guard.check(torch.tensor(loss), gradients(scale))
    assert guard.observation(8).read().verdict == "spike"
    assert guard.check(torch.tensor(3.1), gradients())


def test_nothing_is_a_spike_before_the_window_is_full():
    guard = watched(steps=7)
    assert guard.check(torch.tensor(50.0), gradients())
    assert watched(dataclasses.replace(QUICK, spike_sigma=0.0)).check(torch.tensor(1e9), gradients())


def test_what_is_not_finite_leaves_no_trace():
    guard = watched()
    before = guard.state()
    for _ in range(20):
        assert not guard.check(torch.tensor(math.nan), gradients())
        assert not guard.check(torch.tensor(3.0), gradients(math.inf))
    assert guard.state() == before


@pytest.mark.parametrize("in_a_row", [1, 2, 3, 4])
@pytest.mark.parametrize(("loss", "scale"), [(9.0, 1.0), (3.1, 50.0)])
def test_what_stays_is_a_level(loss, scale, in_a_row):
    """As many steps are left out as never call for a roll-back, and one where each does."""
    guard = watched(dataclasses.replace(QUICK, max_in_a_row=in_a_row, spike_window=256), steps=256)
    kept = [bool(guard.check(torch.tensor(loss), gradients(scale))) for _ in range(200)]
    assert kept.index(True) == max(1, in_a_row - 1) and all(kept[kept.index(True) :])


def test_what_grows_is_no_level():
    guard = watched(WIDE, steps=64)
    assert not any(guard.check(torch.tensor(4.0 + 2.0**step), gradients()) for step in range(6))


def test_spikes_apart_are_all_left_out():
    guard = watched(WIDE, steps=64)
    for height in (10.0, 100.0, 1000.0):
        assert not guard.check(torch.tensor(height), gradients())
        assert all(guard.check(torch.tensor(3.1), gradients()) for _ in range(4))


def test_a_falling_loss_and_a_constant_one_are_no_spikes():
    guard = StepGuard(QUICK)
    assert all(guard.check(torch.tensor(9.0 * 0.99**step), gradients()) for step in range(100))
    assert all(guard.check(torch.tensor(3.0), gradients()) for _ in range(20))


def test_the_check_never_waits_for_the_device():
    guard = watched()
    with NoHostRead():
        guard.check(torch.tensor(3.0), gradients())
        late = guard.observation(0)
    with pytest.raises(AssertionError), NoHostRead():
        late._host[0].item()
    assert late.read().loss == 3.0


def test_an_observation_keeps_its_step_while_the_next_one_runs():
    guard = StepGuard(QUICK)
    guard.check(torch.tensor(1.0), gradients())
    late = guard.observation(0)
    guard.check(torch.tensor(2.0), gradients())
    assert late.read().loss == 1.0 and guard.observation(1).read().loss == 2.0


def test_the_guard_resumes_where_it_was():
    guard, again = watched(), StepGuard(QUICK)
    again.restore(json.loads(json.dumps(guard.state())))
    for loss in (3.1, 3.4, 3.9, 5.0, 3.0):
        assert guard.check(torch.tensor(loss), gradients()) == again.check(torch.tensor(loss), gradients())
    assert guard.state() == again.state()


@pytest.mark.parametrize(("seen", "window"), [(5, 4), (5, 12), (21, 4), (21, 12)])
def test_a_window_of_another_length_keeps_the_newest(seen, window):
    guard, again = StepGuard(QUICK), StepGuard(dataclasses.replace(QUICK, spike_window=window))
    for step in range(seen):
        guard.check(torch.tensor(9.0 - 0.1 * step), gradients())
    again.restore(guard.state())
    kept = [9.0 - 0.1 * step for step in range(seen)][-min(8, window) :]
    assert again.state()["count"] == len(kept)
    assert [loss for loss, _ in again.state()["history"]] == pytest.approx(kept + [0.0] * (window - len(kept)))
    again.check(torch.tensor(1.0), gradients())
    assert again.state()["history"][len(kept) % window][0] == 1.0  # in the place of the oldest


# ---- leaving an update out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, 1e30])
def test_adamw_leaves_weights_and_state_bit_for_bit(bad):
    weight = torch.nn.Parameter(torch.randn(7, 5))
    adamw = torch.optim.AdamW([weight], lr=0.1, fused=True)
    weight.grad = torch.randn(7, 5)
    adamw.found_inf = (~torch.tensor(True)).float()
    adamw.step()
    before = [weight.detach().clone(), *(value.clone() for value in adamw.state[weight].values())]
    weight.grad = torch.full((7, 5), bad)
    adamw.found_inf = (~torch.tensor(False)).float()
    adamw.step()
    after = [weight.detach(), *adamw.state[weight].values()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_muon_leaves_weights_and_state_bit_for_bit(bad):
    weight, momentum, second = torch.randn(2, 8, 6), torch.randn(2, 8, 6), torch.rand(2, 8, 1)

    def step(gradient, keep):
        update = muon_update(gradient, momentum, second, 0.95, 0.9, "polar_express", None, keep)
        descend(weight, update, 0.1, 0.1)

    tensors = (weight, momentum, second)
    before = [tensor.clone() for tensor in tensors]
    step(torch.full((2, 8, 6), bad), torch.tensor(False))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    step(torch.randn(2, 8, 6), torch.tensor(True))
    assert not any(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


# ---- the policy --------------------------------------------------------------------------------------------------


def told(policy, verdicts, first=0):
    """Actions for a string of verdicts: ``.`` ok, ``s`` spike, ``n`` non-finite."""
    kinds = {".": "ok", "s": "spike", "n": "non-finite"}
    return [policy.judge(Observation(first + i, 3.0, 1.0, kinds[v])) for i, v in enumerate(verdicts)]


def actions(decisions):
    return [decision.action for decision in decisions]


def test_single_spikes_are_left_out_and_logged():
    decisions = told(SpikePolicy(QUICK), "..s...n.")
    assert actions(decisions) == ["go", "go", "left_out", "go", "go", "go", "left_out", "go"]
    assert [d.event["step"] for d in decisions if d.event] == [2, 6]
    assert decisions[6].event["reason"] == "non-finite"


def test_spikes_in_a_row_roll_back_and_are_passed_over():
    policy = SpikePolicy(QUICK)
    *_, last = told(policy, ".....sss")
    assert last.action == "roll_back" and last.first == 5 and last.pass_over == (3, 7)
    assert policy.ranges == []  # until somebody has gone back
    policy.pass_over(*last.pass_over)
    assert [step for step in range(12) if policy.passes_over(step)] == [3, 4, 5, 6, 7]
    assert [policy.next_step(step) for step in (2, 3, 5, 8)] == [2, 8, 8, 8]


def test_an_earlier_spike_is_not_passed_over_with_those_in_a_row():
    *_, last = told(SpikePolicy(QUICK), "s...sss")
    assert (last.first, last.pass_over) == (4, (2, 6))
    *_, last = told(SpikePolicy(QUICK), "....s.ss.s")
    assert (last.first, last.pass_over) == (4, (2, 9))


def test_spikes_within_a_window_roll_back():
    assert actions(told(SpikePolicy(QUICK), "s.s.s.s"))[-1] == "roll_back"
    spread = actions(told(SpikePolicy(QUICK), "s..s..s..s..s"))
    assert "roll_back" not in spread and spread.count("left_out") == 5


def test_the_start_of_a_run_is_no_negative_step():
    assert told(SpikePolicy(QUICK), "nnn")[-1].pass_over == (0, 2)


def test_spikes_alone_never_stop_a_run():
    """Two roll-backs, then nothing but steps left out, until they are ten windows back."""
    seen = actions(told(SpikePolicy(QUICK), "s" * 85))
    assert [step for step, action in enumerate(seen) if action == "roll_back"] == [2, 5, 82]
    assert "stop" not in seen and "go" not in seen


@pytest.mark.parametrize("found", [True, False])
def test_what_is_never_finite_stops_after_as_many_steps_as_roll_backs_take(found):
    """With roll-backs, whose steps before the fault are trained again, and without a checkpoint for any."""
    policy, seen = SpikePolicy(QUICK), []
    told(policy, "." * 20)
    checkpoint, step = json.loads(json.dumps(policy.state())), 20
    while "stop" not in seen:
        (decision,) = told(policy, "n", first=step)
        seen.append(decision.action)
        step += 1
        if decision.action == "roll_back" and found:
            policy.rewind(checkpoint)
            policy.pass_over(*decision.pass_over)
            told(policy, "." * (decision.pass_over[0] - 10), first=10)
            step = policy.next_step(decision.pass_over[0])
    row = ["left_out", "left_out"]
    assert seen == [*row, "roll_back", *row, "roll_back", *row, "stop"] and decision.first == 20


def test_bursts_that_end_never_stop_a_run():
    """Roll-backs are used up early; what a fresh start would survive goes on being survived."""
    seen = actions(told(SpikePolicy(QUICK), "....nnnnnnnn" * 30))
    calls = [step for step, action in enumerate(seen) if action == "roll_back"]
    assert "stop" not in seen and calls[:2] == [6, 9]
    assert all(later - call >= 80 for call, later in zip(calls, calls[2:], strict=False)) and len(calls) == 10


def test_a_finite_spike_ends_what_is_not_finite():
    assert "stop" not in actions(told(SpikePolicy(QUICK), "nnnnnnnns" * 10))


def test_rolling_back_remembers_what_to_pass_over():
    """The checkpoint knows nothing of the roll-back; without its memory the same rows would spike again."""
    policy = SpikePolicy(QUICK)
    told(policy, "..s.....")
    checkpoint = json.loads(json.dumps(policy.state()))
    *_, decision = told(policy, "sss", first=20)
    policy.rewind(checkpoint)
    policy.pass_over(*decision.pass_over)
    assert policy.passes_over(20) and policy.passes_over(18) and not policy.passes_over(17)
    assert policy.left_out == checkpoint["left_out"] and policy.skipped == checkpoint["skipped"] == [2]
    assert policy.rollbacks == [22]


def test_a_run_does_not_end_on_weights_of_which_nothing_is_finite():
    policy = SpikePolicy(QUICK)
    assert policy.judge_end(10) is None
    told(policy, "........nn")
    decision = policy.judge_end(10)
    assert (decision.action, decision.first, decision.pass_over) == ("roll_back", 8, (6, 9))
    assert policy.judge_end(10) is None
    told(policy, "..........nn.")
    assert policy.judge_end(13) is None


def test_beginning_again_forgets_what_lies_ahead():
    policy = SpikePolicy(QUICK)
    told(policy, "..........nnn")
    policy.pass_over(2, 3)
    policy.pass_over(8, 12)
    policy.begin_again(6)
    assert policy.ranges == [[2, 3]] and actions(told(policy, "nn", first=6)) == ["left_out", "left_out"]
    assert policy.state()["rollbacks"] == []


# ---- what is released --------------------------------------------------------------------------------------------


def releases(verdicts, steps, *passed):
    policy = SpikePolicy(dataclasses.replace(QUICK, max_in_a_row=99, max_in_window=99))
    told(policy, verdicts)
    for span in passed:
        policy.pass_over(*span)
    return policy.releases(steps)


def test_a_healthy_run_releases_all_its_steps():
    assert releases("....", [0, 1, 2, 4, 8]) == [0, 1, 2, 4, 8]  # those to come too


def test_a_step_that_was_passed_over_is_not_released():
    assert releases("", [0, 4, 6, 8, 12], (4, 6)) == [0, 4, 8, 12]


def test_the_run_ends_where_its_training_ends():
    assert releases("", [0, 4, 8, 12], (9, 11)) == [0, 4, 8, 9]
    assert releases("", [0, 4, 8, 12], (8, 11)) == [0, 4, 8]


def test_steps_without_an_applied_one_between_are_released_once():
    assert releases(".nn.", [0, 1, 2, 3, 4]) == [0, 1, 4]
    assert releases("nn..", [0, 1, 2, 4]) == [0, 4]
    assert releases("nn..", [1, 2, 4]) == [4]
    assert releases("nnnn", [2, 4]) == []
    assert releases("..s.", [0, 2, 3, 8], (3, 6)) == [0, 2, 8]


def test_the_policy_resumes_where_it_was():
    """Cut anywhere, a run gives the same answers."""
    verdicts = "..s.ss...sss....n.s.s.s......nnn.s.."
    whole = SpikePolicy(QUICK)
    expected = told(whole, verdicts)
    assert "roll_back" in actions(expected)
    for cut in range(len(verdicts)):
        first, second = SpikePolicy(QUICK), SpikePolicy(QUICK)
        decisions = told(first, verdicts[:cut])
        second.restore(json.loads(json.dumps(first.state())))
        assert decisions + told(second, verdicts[cut:], first=cut) == expected
        assert second.state() == whole.state()


def test_events_are_json():
    decision = SpikePolicy(QUICK).judge(Observation(3, math.nan, math.inf, "non-finite"))
    assert json.loads(json.dumps(decision.event, allow_nan=False))["loss"] == "nan"
