"""Loss modules, schedules and sampling modules against torch, fastvae.functional and fastvae.reference."""

import inspect
import io
import math
from copy import deepcopy

import pytest
import torch
from _helpers import Source, assert_close, each_place, leaf, wide_leaf
from torch import nn

import fastvae.nn as fnn
from fastvae import functional as FV
from fastvae.reference import latent, reconstruction

EACH_PLACE = each_place("reconstruction_forward")


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@EACH_PLACE
def test_losses_are_those_of_torch(place, reduction):
    source = Source(place.device)
    logits, target, weight = source.normal(6, 5), source.uniform(6, 5), source.uniform(6, 5)
    pos_weight = source.uniform(5)
    pairs = [
        (fnn.BCEWithLogitsLoss, nn.BCEWithLogitsLoss, {"weight": weight, "pos_weight": pos_weight}, logits),
        (fnn.BCELoss, nn.BCELoss, {"weight": weight}, logits.sigmoid()),
        (fnn.MSELoss, nn.MSELoss, {}, logits),
    ]
    for ours, theirs, arguments, values in pairs:
        input, oracle = leaf(values), wide_leaf(values)
        loss = ours(**arguments, reduction=reduction)(input, target)
        expected = theirs(**{k: v.double() for k, v in arguments.items()}, reduction=reduction)(oracle, target.double())
        assert_close(loss, expected.detach(), torch.float32, magnitude=expected.abs().sum().item())
        loss.sum().backward()
        expected.sum().backward()
        assert_close(input.grad, oracle.grad, torch.float32, roundings=4)


def test_losses_take_the_positional_arguments_of_torch():
    weight, pos_weight = torch.rand(3), torch.rand(3)
    loss = fnn.BCEWithLogitsLoss(weight, reduction="sum", pos_weight=pos_weight)
    assert loss.weight is weight
    assert loss.pos_weight is pos_weight
    assert dict(loss.named_buffers()).keys() == {"weight", "pos_weight"}
    assert fnn.MSELoss().reduction == fnn.BCELoss().reduction == fnn.BCEWithLogitsLoss().reduction == nn.MSELoss().reduction


@pytest.mark.parametrize("loss", [fnn.BCEWithLogitsLoss(), fnn.BCELoss(), fnn.MSELoss(), fnn.GaussianNLL()], ids=lambda m: type(m).__name__)
def test_reduction_can_be_overridden_for_a_call(loss):
    input, target = torch.rand(4, 3), torch.rand(4, 3)
    assert loss(input, target, reduction="sample").shape == (4,)
    torch.testing.assert_close(loss(input, target, reduction="batchmean"), loss(input, target, reduction="sum") / 4)
    assert loss(input, target).shape == ()


@pytest.mark.parametrize("logvar", [-1.5, torch.tensor([[-2.0], [0.0], [1.0]])], ids=["global", "channel"])
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@EACH_PLACE
def test_gaussian_nll_is_the_density(place, logvar, learned):
    source = Source(place.device)
    mean, target = source.normal(4, 3, 5), source.normal(4, 3, 5)
    module = fnn.GaussianNLL(logvar, learned=learned).to(place.device)
    scale = (0.5 * torch.as_tensor(logvar).double()).exp().to(place.device)
    density = torch.distributions.Normal(mean.double(), scale).log_prob(target.double())
    assert_close(module(mean, target), -density.sum((1, 2)).mean(), torch.float32)
    assert len(list(module.parameters())) == learned
    assert module.state_dict().keys() == {"logvar"}


def test_learned_variance_settles_at_the_mean_squared_error():
    torch.manual_seed(0)
    mean, target = torch.zeros(256, 2, 8), torch.randn(256, 2, 8) * torch.tensor([0.1, 3.0]).view(2, 1)
    best = (target**2).mean((0, 2)).log().view(2, 1)
    module = fnn.GaussianNLL(best, learned=True)
    module(mean, target).backward()
    torch.testing.assert_close(module.logvar.grad, torch.zeros(2, 1), atol=1e-4, rtol=0)
    assert module.logvar is not best


OPTIONS = [
    {},
    {"beta": 4.0},
    {"beta": 0.0},
    {"free_bits": 0.3},
    {"beta": 10.0, "capacity": 2.0},
    {"beta": 10.0, "capacity": 500.0, "free_bits": 0.1},
]


def reference_elbo(recon, target, mu, logvar, likelihood, reduction, beta=1.0, capacity=None, free_bits=0.0):
    terms = {
        "bernoulli_logits": lambda: reconstruction.binary_cross_entropy_with_logits(recon, target, reduction=reduction),
        "bernoulli": lambda: reconstruction.binary_cross_entropy(recon, target, reduction=reduction),
        "gaussian": lambda: 0.5 * reconstruction.mse_loss(recon, target, reduction=reduction) + gaussian_constant(recon, reduction),
    }
    kl = latent.kl_normal(mu, logvar, reduction=reduction, free_bits=free_bits)
    samples = len(mu) if reduction == "sum" else 1
    penalty = kl if capacity is None else (kl - capacity * samples).abs()
    return terms[likelihood]() + beta * penalty


def gaussian_constant(recon, reduction):
    dimensions = recon.numel() if reduction == "sum" else recon[0].numel()
    return 0.5 * math.log(2 * math.pi) * dimensions


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "sample"])
@pytest.mark.parametrize("likelihood", ["bernoulli_logits", "bernoulli", "gaussian"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@EACH_PLACE
def test_elbo_loss_is_its_formula(place, options, likelihood, reduction):
    source = Source(place.device)
    recon, target = source.uniform(6, 1, 4, 4), source.uniform(6, 1, 4, 4)
    mu, logvar = source.normal(6, 3), source.normal(6, 3)
    leaves, wide = [leaf(t) for t in (recon, mu, logvar)], [wide_leaf(t) for t in (recon, mu, logvar)]
    loss = fnn.ELBOLoss(likelihood=likelihood, reduction=reduction, **options)(leaves[0], target, *leaves[1:]).loss
    oracle = reference_elbo(wide[0], target.double(), *wide[1:], likelihood, reduction, **options)
    assert_close(loss, oracle.detach(), torch.float32, magnitude=100.0 * options.get("beta", 1.0))
    loss.sum().backward()
    oracle.sum().backward()
    for ours, expected in zip(leaves, wide, strict=True):
        assert_close(ours.grad, expected.grad, torch.float32, magnitude=options.get("beta", 1.0), roundings=2)


def test_the_module_of_a_function_has_its_arguments_and_defaults():
    function, module = inspect.signature(FV.elbo_loss).parameters, inspect.signature(fnn.ELBOLoss).parameters
    assert list(inspect.signature(fnn.ELBOLoss.forward).parameters)[1:] + list(module) == list(function)
    assert all(parameter.default == function[name].default and parameter.kind == function[name].kind for name, parameter in module.items())


def test_elbo_loss_gives_the_terms():
    recon, target, mu, logvar = torch.randn(4, 8), torch.rand(4, 8), torch.randn(4, 2), torch.randn(4, 2)
    output = fnn.ELBOLoss(beta=3.0)(recon, target, mu, logvar)
    assert isinstance(output, FV.ELBO)
    torch.testing.assert_close(output.loss, output.recon_loss + 3.0 * output.kl)
    torch.testing.assert_close(output.kl, FV.kl_normal(mu, logvar))


def test_kl_penalty():
    kl = torch.tensor([1.0, 5.0])
    assert fnn.KLPenalty()(kl).tolist() == [1.0, 5.0]
    assert fnn.KLPenalty(2.0)(kl).tolist() == [2.0, 10.0]
    assert fnn.KLPenalty(2.0, capacity=3.0)(kl).tolist() == [4.0, 4.0]


SCHEDULES = [
    (fnn.LinearSchedule(10), {0: 0.0, 1: 0.1, 5: 0.5, 10: 1.0, 1000: 1.0}),
    (fnn.LinearSchedule(4, start=2.0, end=1.0), {0: 2.0, 1: 1.75, 4: 1.0, 5: 1.0}),
    (fnn.CosineSchedule(10), {0: 0.0, 5: 0.5, 10: 1.0, 11: 1.0}),
    (fnn.CosineSchedule(3, end=4.0), {1: 1.0, 2: 3.0}),
    (fnn.CyclicalSchedule(80), {0: 0.0, 5: 0.5, 10: 1.0, 19: 1.0, 20: 0.0, 25: 0.5, 60: 0.0, 79: 1.0, 80: 1.0, 85: 1.0}),
    (fnn.CyclicalSchedule(10, cycles=3, ratio=1.0, end=2.0), {0: 0.0, 1: 0.6, 3: 1.8, 4: 0.4, 10: 2.0}),
    (fnn.CapacitySchedule(100), {0: 0.0, 50: 12.5, 100: 25.0, 200: 25.0}),
]


@pytest.mark.parametrize(("schedule", "points"), SCHEDULES, ids=str)
def test_schedules(schedule, points):
    assert {step: schedule(step) for step in points} == pytest.approx(points)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: fnn.LinearSchedule(0), "steps"),
        (lambda: fnn.CosineSchedule(1.5), "steps"),
        (lambda: fnn.CyclicalSchedule(8, cycles=9), "cycles"),
        (lambda: fnn.CyclicalSchedule(8, ratio=0.0), "ratio"),
        (lambda: fnn.ELBOLoss(likelihood="poisson"), "likelihood"),
        (lambda: fnn.ELBOLoss(reduction="mean"), "reduction"),
        (lambda: fnn.ELBOLoss(beta=-1.0), "beta"),
        (lambda: fnn.ELBOLoss(beta=None), "beta"),
        (lambda: fnn.KLPenalty(capacity=float("nan")), "capacity"),
        (lambda: fnn.ELBOLoss(free_bits=-1.0), "free_bits"),
        (lambda: fnn.MSELoss("batch"), "reduction"),
        (lambda: fnn.ReparameterizeKL(reduction="batch"), "reduction"),
    ],
)
def test_errors_name_the_argument(make, name):
    with pytest.raises(ValueError, match=f"^{name}: got .*takes"):
        make()


def scheduled_loss():
    return fnn.ELBOLoss(beta=fnn.LinearSchedule(10), capacity=fnn.CapacitySchedule(20, end=40.0))


def test_step_advances_the_weights():
    loss = scheduled_loss()
    for step in range(12):
        assert loss.num_steps == step
        assert loss.beta.item() == pytest.approx(min(step / 10, 1.0))
        assert loss.capacity.item() == pytest.approx(2.0 * step)
        loss.step()


def save_and_load(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_checkpoint_in_the_middle_of_a_schedule():
    loss = nn.ModuleDict({"loss": scheduled_loss()})
    for _ in range(3):
        loss["loss"].step()
    resumed = nn.ModuleDict({"loss": scheduled_loss()})
    resumed.load_state_dict(save_and_load(loss.state_dict()))
    for _ in range(3):
        assert resumed["loss"].beta == loss["loss"].beta
        assert resumed["loss"].capacity == loss["loss"].capacity
        loss["loss"].step()
        resumed["loss"].step()
    assert resumed["loss"].num_steps == 6
    assert resumed["loss"].beta.item() == pytest.approx(0.6)


def test_a_copy_goes_its_own_way():
    loss = scheduled_loss()
    loss.step()
    copy = deepcopy(loss)
    copy.step()
    assert (loss.num_steps, loss.beta.item()) == (1, pytest.approx(0.1))
    assert (copy.num_steps, copy.beta.item()) == (2, pytest.approx(0.2))


def test_only_a_schedule_is_counted_in_the_state():
    loss = fnn.ELBOLoss(beta=2.0)
    loss.step()
    assert loss.state_dict() == {}
    loss.beta = fnn.LinearSchedule(4)
    assert loss.state_dict() == {"num_steps": 1}
    loss.beta = 1.0
    assert loss.state_dict() == {}


def test_a_loss_of_numbers_loads_the_state_of_a_schedule():
    scheduled, loss = scheduled_loss(), fnn.ELBOLoss(beta=2.0)
    scheduled.step()
    assert loss.load_state_dict(scheduled.state_dict()) == ([], [])
    assert loss.beta == 2.0
    loss.beta = fnn.LinearSchedule(4)
    assert loss.beta == 0.25
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"num_steps\""):
        scheduled.load_state_dict(fnn.ELBOLoss(beta=2.0).state_dict())


@pytest.mark.parametrize("schedule", [schedule for schedule, _ in SCHEDULES], ids=str)
def test_schedules_are_data(schedule):
    assert save_and_load({"schedule": schedule}) == {"schedule": schedule}


def test_a_compiled_loss_follows_its_schedule():
    loss = fnn.KLPenalty(beta=fnn.LinearSchedule(10))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    kl = torch.tensor(5.0)
    assert compiled(kl) == 0.0
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(1, 4):
            loss.step()
            assert compiled(kl).item() == pytest.approx(0.5 * step)


def test_module_shows_its_schedule():
    assert "beta=LinearSchedule(steps=10" in repr(scheduled_loss())
    assert "beta=2.0, capacity=None" in repr(fnn.KLPenalty(2.0))


@EACH_PLACE
def test_reparameterize_kl_in_training_mode_samples(place):
    source = Source(place.device)
    mu, logvar = leaf(source.normal(4, 3)), leaf(source.normal(4, 3))
    z, kl = fnn.ReparameterizeKL(num_samples=2, free_bits=0.2)(mu, logvar, seed=7)
    expected = FV.reparameterize_kl(mu, logvar, num_samples=2, free_bits=0.2, seed=7)
    assert torch.equal(z, expected[0])
    assert torch.equal(kl, expected[1])
    (z.sum() + kl).backward()
    assert mu.grad.abs().min() > 0
    assert logvar.grad.abs().min() > 0


def test_reparameterize_kl_in_evaluation_mode_gives_the_mean():
    mu, logvar = torch.randn(4, 3), torch.randn(4, 3)
    module = fnn.ReparameterizeKL(reduction="sample").eval()
    z, kl = module(mu, logvar)
    assert torch.equal(z, mu)
    torch.testing.assert_close(kl, FV.kl_normal(mu, logvar, reduction="sample"))
    assert fnn.ReparameterizeKL(num_samples=5).eval()(mu, logvar)[0].shape == (5, 4, 3)


@EACH_PLACE
def test_reparameterize_gives_z_alone(place):
    source = Source(place.device)
    mu, logvar = leaf(source.normal(4, 3)), leaf(source.normal(4, 3))
    module = fnn.Reparameterize(num_samples=2, logvar_clamp=(-1.0, 1.0))
    assert torch.equal(module(mu, logvar, seed=7), FV.reparameterize(mu, logvar, num_samples=2, logvar_clamp=(-1.0, 1.0), seed=7))
    assert torch.equal(module.eval()(mu, logvar), mu.expand(2, 4, 3))
    assert torch.equal(module(mu, logvar, seed=7), fnn.ReparameterizeKL(num_samples=2, logvar_clamp=(-1.0, 1.0))(mu, logvar, seed=7)[0])
    assert not torch.equal(fnn.Reparameterize(sample_in_eval=True).eval()(mu, logvar), mu)
    assert repr(module) == "Reparameterize(num_samples=2, sample_in_eval=False, logvar_clamp=(-1.0, 1.0))"


def test_reparameterize_kl_in_evaluation_mode_samples_on_demand():
    mu, logvar, eps = torch.randn(4, 3), torch.randn(4, 3), torch.randn(4, 3)
    expected = FV.reparameterize(mu, logvar, eps=eps)
    assert torch.equal(fnn.ReparameterizeKL().eval()(mu, logvar, eps=eps)[0], expected)
    assert not torch.equal(fnn.ReparameterizeKL(sample_in_eval=True).eval()(mu, logvar)[0], mu)


def test_reparameterize_kl_with_a_learned_prior():
    mu, logvar, prior_mu, prior_logvar = (torch.randn(4, 3) for _ in range(4))
    for module in (fnn.ReparameterizeKL(), fnn.ReparameterizeKL().eval()):
        kl = module(mu, logvar, prior_mu, prior_logvar)[1]
        torch.testing.assert_close(kl, latent.kl_normal(mu, logvar, prior_mu, prior_logvar))
