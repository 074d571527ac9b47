"""What users do around the weight of the KL: step it where it suits them, compile the step, copy, load, average and broadcast the model."""

import copy

import pytest
import torch
from torch import nn

from fastvae.models import VAE
from fastvae.nn import CapacitySchedule, CosineSchedule, CyclicalSchedule, ELBOLoss, KLPenalty, LinearSchedule


def own_function(step: int) -> float:
    """Not of the package, and for integers alone."""
    return (0.0, 0.25, 0.5, 0.75)[step] if step < 4 else 1.0


class Squared(LinearSchedule):
    """A subclass whose arithmetic is not that of its parent."""

    def __call__(self, step: int) -> float:
        return super().__call__(step) ** 2 if step > 0 else 0.0


SCHEDULES = [LinearSchedule(4), CosineSchedule(4), CyclicalSchedule(8, cycles=2), CapacitySchedule(4, end=2.0), own_function, Squared(4)]


def name(schedule) -> str:
    # Not that of a function's address, by which two processes would not know the tests of each other.
    return schedule.__name__ if schedule is own_function else str(schedule)


each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=name)


def assert_at(module, schedule, step: int) -> None:
    assert module.num_steps == step
    assert float(module.beta) == pytest.approx(schedule(step))
    kl = torch.tensor(3.0)
    assert float(module(kl)) == pytest.approx(3.0 * schedule(step))


@pytest.mark.parametrize("schedule", [*SCHEDULES[:4], CyclicalSchedule(10, 3, 0.4, 2.0, 1.0), CosineSchedule(3, 1.0, 0.2)], ids=str)
def test_a_schedule_of_a_tensor_is_that_of_a_number(schedule):
    steps = torch.arange(15)
    expected = torch.tensor([schedule(step) for step in range(15)])
    torch.testing.assert_close(schedule(steps), expected)
    torch.testing.assert_close(torch.stack([schedule(step) for step in steps]), expected)


@each_schedule
def test_step_before_backward(schedule):
    """The gradient is that of the loss as it was computed."""
    penalty, kl = KLPenalty(schedule, capacity=schedule), torch.tensor(5.0, requires_grad=True)
    penalty.step()
    loss = penalty(kl)
    penalty.step()
    loss.backward()
    assert kl.grad.item() == pytest.approx(schedule(1))


@each_schedule
def test_one_loss_for_several_steps(schedule):
    penalty, kl = KLPenalty(schedule), torch.tensor(5.0, requires_grad=True)
    total = 0.0
    for _ in range(3):
        total = total + penalty(kl)
        penalty.step()
    total.backward()
    assert kl.grad.item() == pytest.approx(sum(schedule(step) for step in range(3)))


@pytest.mark.parametrize("schedule", SCHEDULES[:4], ids=str)
def test_a_compiled_step_that_advances_its_schedule(schedule):
    torch.compiler.reset()
    model, x = ELBOLoss(beta=schedule), torch.rand(4, 6)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(recon, mu, logvar):
        output = model(recon, x, mu, logvar)
        model.step()
        return output

    tensors = [torch.randn(4, n, requires_grad=True) for n in (6, 2, 2)]
    losses = []
    for _ in range(5):
        losses.append(step(*tensors))
        losses[-1].loss.backward()
    for number, (loss, recon_loss, kl) in enumerate(losses):
        torch.testing.assert_close(loss, recon_loss + schedule(number) * kl)
    assert model.num_steps == 5


def test_a_function_is_called_outside_of_the_compiled_graph():
    torch.compiler.reset()
    penalty, kl = KLPenalty(own_function), torch.tensor(2.0, requires_grad=True)

    @torch.compile(backend="aot_eager")
    def step(kl):
        loss = penalty(kl)
        penalty.step()
        return loss

    losses = [step(kl) for _ in range(5)]
    sum(losses).backward()
    assert [loss.item() for loss in losses] == pytest.approx([2 * own_function(step) for step in range(5)])
    assert kl.grad.item() == pytest.approx(2.5)


@each_schedule
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_step_between_the_passes_of_a_compiled_loss(schedule, backend):
    torch.compiler.reset()
    penalty, kl = KLPenalty(schedule, capacity=schedule), torch.tensor(5.0, requires_grad=True)
    compiled = torch.compile(penalty, fullgraph=True, backend=backend)
    penalty.step()
    loss = compiled(kl)
    penalty.step()
    loss.backward()
    assert kl.grad.item() == pytest.approx(schedule(1))


@each_schedule
def test_a_compiled_loss_does_not_compile_again(schedule):
    torch.compiler.reset()
    penalty = KLPenalty(schedule)
    compiled = torch.compile(penalty, fullgraph=True, backend="aot_eager")
    kl = torch.tensor(3.0)
    compiled(kl)
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(1, 5):
            penalty.step()
            assert float(compiled(kl)) == pytest.approx(3.0 * schedule(step))


@each_schedule
def test_a_compiled_loss_after_loading_and_after_a_new_weight(schedule):
    torch.compiler.reset()
    penalty, kl = KLPenalty(schedule), torch.tensor(3.0)
    compiled = torch.compile(penalty, fullgraph=True, backend="aot_eager")
    compiled(kl)
    penalty.load_state_dict({"num_steps": torch.tensor(3)})
    assert float(compiled(kl)) == pytest.approx(3.0 * schedule(3))
    penalty.beta = own_function
    assert float(compiled(kl)) == pytest.approx(3.0 * own_function(3))


def advanced(schedule, steps: int = 3) -> KLPenalty:
    penalty = KLPenalty(schedule)
    for _ in range(steps):
        penalty.step()
    return penalty


def copy_buffers(source: nn.Module, target: nn.Module) -> nn.Module:
    for ours, theirs in zip(target.buffers(), source.buffers(), strict=True):
        ours.copy_(theirs)
    return target


def copy_state(source: nn.Module, target: nn.Module) -> nn.Module:
    """As helpers for averages of models do: what is in the state_dict alone."""
    state = target.state_dict()
    for name, value in source.state_dict().items():
        state[name].copy_(value)
    return target


def load(source: nn.Module, target: nn.Module) -> nn.Module:
    target.load_state_dict(source.state_dict())
    return target


def assign(source: nn.Module, target: nn.Module) -> nn.Module:
    target.load_state_dict(copy.deepcopy(source.state_dict()), assign=True)
    return target


def replace(source: nn.Module, target: nn.Module) -> nn.Module:
    target.num_steps = source.num_steps.clone()
    return target


def average(source: nn.Module, target: nn.Module) -> nn.Module:
    averaged = torch.optim.swa_utils.AveragedModel(target, use_buffers=False)
    averaged.update_parameters(source)
    return averaged.module


@each_schedule
@pytest.mark.parametrize("transfer", [copy_buffers, copy_state, load, assign, replace, average])
@pytest.mark.parametrize("used", [False, True])
def test_a_schedule_goes_where_its_steps_are_copied_to(schedule, transfer, used):
    target = advanced(schedule, 1)
    if used:
        target(torch.tensor(1.0))
    target = transfer(advanced(schedule, 3), target)
    assert_at(target, schedule, 3)
    target.step()
    assert_at(target, schedule, 4)


@each_schedule
def test_steps_that_are_written_by_hand(schedule):
    penalty = advanced(schedule, 2)
    penalty.num_steps.fill_(1)
    penalty.step()
    assert_at(penalty, schedule, 2)
    penalty.num_steps.zero_()
    assert_at(penalty, schedule, 0)


@each_schedule
def test_copies_and_moved_modules_go_on(schedule):
    for other in (copy.deepcopy(advanced(schedule, 2)), copy.copy(advanced(schedule, 2)), advanced(schedule, 2).double().half()):
        assert_at(other, schedule, 2)
        other.step()
        assert_at(other, schedule, 3)


def test_the_value_of_a_half_precision_module_is_not_rounded():
    assert float(KLPenalty(lambda step: 0.3).half().beta) == pytest.approx(0.3, rel=1e-3)
    assert float(advanced(LinearSchedule(10)).half().beta) == pytest.approx(0.3)


def test_a_weight_may_be_set_in_training():
    penalty, kl = KLPenalty(2.0), torch.tensor(3.0)
    penalty.beta = 4.0
    assert penalty(kl) == 12.0
    penalty.beta, penalty.capacity = LinearSchedule(4, 1.0, 5.0), 1.0
    penalty.step()
    assert penalty(kl) == 4.0
    penalty.beta, penalty.capacity = own_function, None
    assert penalty(kl) == 0.75
    penalty.beta = 1
    assert penalty(kl) == 3.0
    assert penalty.state_dict() == {}
    with pytest.raises(ValueError, match=r"beta: got -1\.0, takes a number >= 0 or a schedule"):
        penalty.beta = -1.0


@pytest.mark.parametrize("schedule", [LinearSchedule(4), own_function], ids=name)
def test_stepping_reads_no_value_from_the_device(schedule):
    """On the meta device there is none to read."""
    penalty = advanced(schedule, 1).to("meta")
    if schedule is own_function:
        penalty._known_steps = penalty.num_steps, penalty.num_steps._version, 1
    for _ in range(3):
        penalty(torch.ones((), device="meta"))
        penalty.step()


def _train_after_a_checkpoint_on_rank_0(rank):
    model = VAE.mlp(4, (4,), 2, beta=LinearSchedule(4), capacity=own_function)
    if rank == 0:
        model.kl_penalty.num_steps.fill_(3)
    parallel = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        parallel(torch.rand(3, 4)).loss.backward()
        model.kl_penalty.step()
    return [float(value) for value in (model.kl_penalty.num_steps, model.kl_penalty.beta, model.kl_penalty.capacity)]


def test_ranks_follow_the_checkpoint_that_one_of_them_loaded(ranks):
    assert ranks.run(_train_after_a_checkpoint_on_rank_0) == [[5, 1.0, 1.0]] * 2
