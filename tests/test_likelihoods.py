"""The contract that every likelihood keeps: reductions, dtypes, shapes, errors, and what torch expects of a module."""

import io
import json

import pytest
import torch
from _helpers import DEVICES, leaf, wide_leaf
from _likelihoods import CASES, CHANNELS
from torch import nn
from torch._subclasses import FakeTensorMode

from fastvae import distributions
from fastvae import functional as FV
from fastvae.distributions import (
    BernoulliLikelihood,
    BernoulliProbsLikelihood,
    CategoricalLikelihood,
    GaussianLikelihood,
    LaplaceLikelihood,
    Likelihood,
    NegativeBinomialLikelihood,
)
from fastvae.models._recipe import from_plain, to_plain
from fastvae.nn import BCELoss, BCEWithLogitsLoss, GaussianNLL

EACH = pytest.mark.parametrize("name", CASES)
SHAPE = (4, CHANNELS, 5)


def build(name, *shape):
    """The likelihood, the decoder's output and data."""
    case = CASES[name]
    likelihood, shape = case.make(), shape or SHAPE
    return likelihood, case.params(likelihood, *shape), case.data(*shape)


def test_every_likelihood_has_a_case():
    classes = {value for value in vars(distributions).values() if isinstance(value, type) and issubclass(value, Likelihood)}
    # The two of 8-bit images, whose parameters are no multiple of the channels, have tests of their own.
    fused = {distributions.DiscretizedLogisticLikelihood, distributions.LogisticMixtureLikelihood}
    assert classes - {Likelihood} - fused == {type(case.make()) for case in CASES.values()}


@EACH
def test_reductions(name):
    likelihood, params, x = build(name)
    elements = likelihood(params, x, reduction="none")
    assert elements.shape == x.shape
    samples = elements.flatten(1).sum(1)
    torch.testing.assert_close(likelihood(params, x, reduction="sample"), samples)
    torch.testing.assert_close(likelihood.log_prob(params, x), -samples)
    torch.testing.assert_close(likelihood(params, x), samples.mean())
    torch.testing.assert_close(likelihood(params, x, reduction="sum"), samples.sum())
    torch.testing.assert_close(likelihood(params, x, reduction="mean"), elements.mean())
    with pytest.raises(ValueError, match="reduction: got 'median'"):
        likelihood(params, x, reduction="median")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", DEVICES)
@EACH
def test_losses_and_gradients_are_those_of_float64(name, device, dtype):
    likelihood, params, x = (part.to(device) for part in build(name))
    params, wide = leaf(params.to(dtype)), wide_leaf(params.to(dtype))
    oracle = CASES[name].make().to(device).double()
    if x.is_floating_point():
        x = x.to(dtype)
    loss, expected = likelihood(params, x), oracle(wide, x.double() if x.is_floating_point() else x)
    assert loss.dtype == torch.float32
    assert expected.dtype == torch.float64
    torch.testing.assert_close(loss.double(), expected, rtol=3e-6, atol=3e-6)
    loss.backward()
    expected.backward()
    rtol = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(params.grad.double(), wide.grad, rtol=rtol, atol=1e-5)
    for learned, same in zip(likelihood.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(learned.grad.double(), same.grad, rtol=2e-5, atol=1e-5)


@EACH
def test_a_module_in_bfloat16(name):
    likelihood, params, x = build(name)
    likelihood, params = likelihood.bfloat16(), params.bfloat16().requires_grad_()
    likelihood(params, x).backward()
    assert params.grad.isfinite().all()
    assert all(p.grad.dtype == torch.bfloat16 for p in likelihood.parameters())
    assert likelihood.mean(params).shape == likelihood.sample(params).shape == x.shape


@EACH
def test_compiled_without_a_break(name):
    torch.compiler.reset()
    likelihood, params, x = build(name)
    compiled = torch.compile(lambda p, t: (likelihood(p, t), likelihood.mean(p)), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(params, x), (likelihood(params, x), likelihood.mean(params)))


@EACH
def test_tensors_without_data(name):
    with FakeTensorMode():
        likelihood, params, x = build(name)
        assert likelihood.log_prob(params, x).shape == (SHAPE[0],)
        assert likelihood.sample(params).shape == x.shape


@EACH
def test_per_sample_gradients(name):
    likelihood, params, x = build(name)
    gradient = torch.func.vmap(torch.func.grad(lambda p, t: likelihood(p[None], t[None], reduction="sum")))(params, x)
    together = leaf(params)
    likelihood(together, x, reduction="sum").backward()
    torch.testing.assert_close(gradient, together.grad)


@EACH
def test_a_state_dict_restores(name):
    likelihood, params, x = build(name)
    for parameter in likelihood.parameters():
        nn.init.constant_(parameter, 0.7)
    file = io.BytesIO()
    torch.save(likelihood.state_dict(), file)
    file.seek(0)
    other = CASES[name].make()
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(params, x), likelihood(params, x))


@pytest.mark.parametrize("name", [name for name in CASES if name != "gaussian_tensor"])
def test_a_stored_model_makes_it_again(name):
    likelihood, params, x = build(name)
    again = from_plain(json.loads(json.dumps(to_plain("likelihood", likelihood))))
    assert type(again) is type(likelihood)
    assert torch.equal(again(params, x), likelihood(params, x))


@pytest.mark.parametrize("device", DEVICES)
@EACH
def test_mean_and_sample_have_the_shape_of_the_data(name, device):
    likelihood, params, x = (part.to(device) for part in build(name))
    params = params.requires_grad_()
    draws = [likelihood.sample(params, torch.Generator(device).manual_seed(seed)) for seed in (3, 3, 4)]
    assert likelihood.mean(params).shape == draws[0].shape == x.shape
    assert not draws[0].requires_grad
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    likelihood.check_range(draws[0])
    assert likelihood(params, draws[0]).isfinite()


@EACH
def test_an_empty_batch(name):
    likelihood, params, x = build(name, 0, CHANNELS, 5)
    params = params.requires_grad_()
    loss = likelihood(params, x)
    loss.backward()
    assert loss == 0
    assert likelihood.log_prob(params, x).shape == (0,)
    assert likelihood.mean(params).shape == likelihood.sample(params).shape == x.shape


@EACH
def test_nan_passes_through(name):
    likelihood, params, x = build(name)
    for tensor in (params, x):
        if tensor.is_floating_point():
            spoiled = tensor.clone()
            spoiled[1] = torch.nan
            losses = likelihood(spoiled if tensor is params else params, spoiled if tensor is x else x, reduction="sample")
            assert losses.isnan().tolist() == [False, True, False, False]


@EACH
def test_a_decoder_with_another_number_of_parameters(name):
    likelihood, params, x = build(name)
    wrong = torch.cat([params, params[:, :1]], dim=1)
    with pytest.raises(ValueError, match=r"decoder: gave shape \(4, \d+, \d.*has to give \(4, \d+, \d"):
        likelihood(wrong, x)
    if likelihood.parameters_per_element > 1:
        wrong = params[..., 1:] if CASES[name].layout == "last" else params[:, 1:]
        for method in (likelihood.mean, likelihood.sample):
            with pytest.raises(ValueError, match="decoder: gave shape"):
                method(wrong)


@EACH
def test_data_of_another_dtype_or_shape(name):
    likelihood, params, x = build(name)
    with pytest.raises(TypeError, match=r"x: got torch.bool, takes torch"):
        likelihood(params, x.bool())
    with pytest.raises(TypeError, match=r"params: got torch.int64, takes torch"):
        likelihood(params.long(), x)
    with pytest.raises(TypeError, match="x: got NoneType, takes a tensor"):
        likelihood(params, None)
    with pytest.raises(ValueError, match="x: got a tensor on meta"):
        likelihood(params, x.to("meta"))


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].kind != "real"])
def test_data_out_of_range(name):
    likelihood, _, x = build(name)
    likelihood.check_range(x)
    x[1, 2, 3] = -1
    with pytest.raises(ValueError, match=r"x: got 1 of 60 values outside \[0, [\dinf]+\], the first at \[\(1, 2, 3\)\]"):
        likelihood.check_range(x)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].kind in ("real", "unit")])
def test_an_8_bit_image_is_value_over_255(name):
    likelihood, params, _ = build(name)
    image = torch.randint(256, SHAPE, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    likelihood.check_range(image)
    torch.testing.assert_close(likelihood(params, image), likelihood(params, image / 255))


def test_the_data_of_each_kind_of_categorical():
    params, tokens = torch.randn(2, 256, 4), torch.tensor([[0, 1, 2, 255], [3, 7, 200, 9]])
    integers, images = CategoricalLikelihood(256), CategoricalLikelihood(256, "images")
    last = CategoricalLikelihood(256, "tokens")
    loss = last(params.mT, tokens)
    torch.testing.assert_close(integers(params, tokens[:, None]), loss)
    torch.testing.assert_close(integers(params, tokens[:, None].to(torch.uint8)), loss)
    torch.testing.assert_close(images(params, tokens[:, None].to(torch.uint8)), loss)
    torch.testing.assert_close(images(params, tokens[:, None] / 255), loss)
    torch.testing.assert_close(images.mean(params) * 255, integers.mean(params))
    assert torch.equal(last.mean(params.mT), params.argmax(1))


def test_ignored_tokens_have_no_loss():
    likelihood, params = CategoricalLikelihood(4, "tokens", ignore_index=0), torch.randn(2, 3, 4, requires_grad=True)
    losses = likelihood(params, torch.tensor([[1, 0, 3], [0, 0, 2]]), reduction="none")
    losses.sum().backward()
    ignored = torch.tensor([[False, True, False], [True, True, False]])
    assert torch.equal(losses == 0, ignored)
    assert torch.equal(params.grad.abs().sum(-1) == 0, ignored)
    likelihood.check_range(torch.tensor([0, 3]))


@pytest.mark.parametrize("reduction", ["none", "sample", "batchmean", "sum", "mean"])
def test_the_fused_losses_are_those_of_the_modules(reduction):
    """Bit for bit: a model may replace the modules of fastvae.nn by the likelihoods."""
    logits, x = torch.randn(3, 2, 7), torch.rand(3, 2, 7)
    learned = torch.tensor([-1.0, 2.0])
    channel, module = GaussianLikelihood("per_channel", channels=2), GaussianNLL(learned.view(2, 1), learned=True)
    channel.load_state_dict({"logvar": learned})
    pairs = [
        (BernoulliLikelihood(), BCEWithLogitsLoss(), logits),
        (BernoulliProbsLikelihood(), BCELoss(), logits.sigmoid()),
        (GaussianLikelihood(), GaussianNLL(), logits),
        (GaussianLikelihood("global", logvar=-4.0), GaussianNLL(-4.0, learned=True), logits),
        (channel, module, logits),
    ]
    for likelihood, module, params in pairs:
        ours, theirs = leaf(params.clone()), leaf(params.clone())
        loss, expected = likelihood(ours, x, reduction=reduction), module(theirs, x, reduction=reduction)
        assert torch.equal(loss, expected)
        loss.sum().backward()
        expected.sum().backward()
        assert torch.equal(ours.grad, theirs.grad)
        for a, b in zip(likelihood.parameters(), module.parameters(), strict=True):
            assert torch.equal(a.grad.flatten(), b.grad.flatten())


def test_a_gaussian_of_each_element_is_one_fused_call(monkeypatch):
    calls = []
    monkeypatch.setattr(FV, "gaussian_nll", lambda *args: calls.append(args) or args[0].sum())
    GaussianLikelihood("per_element")(torch.zeros(2, 6), torch.zeros(2, 3))
    assert [tuple(t.shape) for t in calls[0][:3]] == [(2, 3)] * 3


@pytest.mark.parametrize("make", [GaussianLikelihood, LaplaceLikelihood, NegativeBinomialLikelihood])
@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        ("per_pixel", {}, "got 'per_pixel', takes one of 'global', 'per_channel', 'per_element'"),
        (0.0, {}, "got 0.0, takes a number > 0"),
        (True, {}, "got True, takes a number > 0"),
        (torch.tensor([1.0, -1.0]), {}, "got 1 of 2 values outside"),
        (torch.tensor([1, 2]), {}, "got torch.int64"),
        ("per_channel", {}, "channels: got None"),
        ("global", {"channels": 3}, "channels: got 3"),
        (1.0, {"start": 2.0}, "got 2.0, takes another start than 0"),
        ("per_element", {"start": 2.0}, "got 2.0, takes another start than 0"),
    ],
)
def test_arguments_of_a_positive_parameter(make, value, options, message):
    options = {make.log_name if key == "start" else key: option for key, option in options.items()}
    with pytest.raises((TypeError, ValueError), match=message):
        make(value, **options)


def test_channels_are_those_of_the_data():
    with pytest.raises(ValueError, match="decoder: gave 4 channels, has to give 3"):
        GaussianLikelihood("per_channel", channels=3)(torch.zeros(2, 4), torch.zeros(2, 4))


@pytest.mark.parametrize("num_values", [1, 2.5, True])
def test_the_number_of_values_of_a_categorical(num_values):
    with pytest.raises(ValueError, match=f"num_values: got {num_values}, takes an integer >= 2"):
        CategoricalLikelihood(num_values)
    with pytest.raises(ValueError, match="data: got 'words', takes one of"):
        CategoricalLikelihood(4, "words")
