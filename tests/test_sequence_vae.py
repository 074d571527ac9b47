"""The VAE of tokens against its formula, what it writes, and its sentences and command line."""

import math
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from _helpers import brief
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastvae.distributions import MixturePrior
from fastvae.models import SequenceVAE
from fastvae.models.networks import Recurrent
from fastvae.nn import LinearSchedule
from fastvae.reference import latent

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
PAD, BEGIN, END, UNKNOWN = range(4)
TOKENS = torch.tensor([[4, 5, 6, END, PAD, PAD], [7, 8, 9, 10, 11, END], [5, END, PAD, PAD, PAD, PAD]])
EPS = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
EACH_CELL = pytest.mark.parametrize("cell", ["gru", "lstm"])


def tiny(**options) -> SequenceVAE:
    torch.manual_seed(0)
    return SequenceVAE.recurrent(12, 4, 8, 16, **{"word_dropout": 0.0, **options})


@EACH_CELL
def test_a_sequence_and_single_steps_agree_with_torch(cell):
    torch.manual_seed(0)
    module, x = Recurrent(cell, 3, 5), torch.randn(2, 4, 3)
    state = tuple(torch.randn(2, 5) for _ in range(module.num_states))
    outputs, steps, now = module(x, state), [], state
    for step in x.unbind(1):
        now = module.step(step, now)
        steps.append(now[0])
    torch.testing.assert_close(outputs, torch.stack(steps, 1))
    theirs = {"gru": nn.GRU, "lstm": nn.LSTM}[cell](3, 5, batch_first=True)
    theirs.load_state_dict({f"{name}_l0": value for name, value in module.cell.state_dict().items()})
    first = tuple(part.unsqueeze(0) for part in state)
    torch.testing.assert_close(outputs, theirs(x, first if cell == "lstm" else first[0])[0])


@EACH_CELL
def test_the_loss_is_its_formula(cell):
    model = tiny(cell=cell, beta=0.5, free_bits=0.01).double()
    output = model(TOKENS, EPS.double())
    q = model.encode(TOKENS)
    z = q.mu + torch.exp(0.5 * q.logvar) * EPS
    nats = 0.0
    for row, code in zip(TOKENS, z, strict=True):
        state, token = model.decoder.start(code[None]), torch.tensor([BEGIN])
        for target in row[row != PAD]:
            logits, state = model.decoder.step(code[None], token, state)
            nats -= logits.log_softmax(-1)[0, target]
            token = target[None]
    kl = latent.kl_normal(q.mu, q.logvar, free_bits=0.01)
    torch.testing.assert_close(output.recon_loss, nats / 3)
    torch.testing.assert_close(output.kl, kl)
    torch.testing.assert_close(output.loss, nats / 3 + 0.5 * kl)
    assert output.recon.shape == (3, 6, 12)
    output.loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.parameters())


@EACH_CELL
def test_padding_counts_for_nothing(cell):
    model = tiny(cell=cell, pad=3, unknown=0)
    tokens = TOKENS.masked_fill(TOKENS == PAD, 3)
    longer = torch.cat([tokens, torch.full((3, 4), 3)], dim=1)
    first, second = model(tokens, EPS), model(longer, EPS)
    torch.testing.assert_close(second.loss, first.loss)
    torch.testing.assert_close(second.mu, first.mu)
    gradients = [torch.autograd.grad(output.loss, list(model.parameters())) for output in (first, second)]
    torch.testing.assert_close(*gradients)
    # A batch of one, without any padding, has the posterior that its row had.
    torch.testing.assert_close(model.encode(tokens[2:, :2]).mu, first.mu[2:])
    empty = torch.full((1, 3), 3)
    assert model(empty, EPS[:1]).recon_loss == 0


def test_dropped_words_are_unknown_to_the_decoder_in_training_alone():
    model, seen = tiny(word_dropout=0.5), []
    model.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    generator = torch.Generator().manual_seed(0)
    long = TOKENS[1:2].repeat(2000, 1)
    model(long, generator=generator)
    given, whole = seen[0], torch.cat([torch.full((2000, 1), BEGIN), long[:, :-1]], dim=1)
    dropped = given == UNKNOWN
    assert not dropped[:, 0].any()
    assert torch.equal(given[~dropped], whole[~dropped])
    assert float(dropped[:, 1:].float().mean()) == pytest.approx(0.5, abs=0.02)
    model.eval()(TOKENS)
    model.log_prob_bound(TOKENS)
    assert not (seen[1] == UNKNOWN).any()
    assert not (seen[2] == UNKNOWN).any()


def test_the_generator_decides_noise_and_words():
    model = tiny(word_dropout=0.5)
    first, second, other = (model(TOKENS, generator=torch.Generator().manual_seed(seed)).loss for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@EACH_CELL
def test_it_overfits_64_sequences(cell):
    torch.manual_seed(0)
    words = torch.randint(4, 12, (64, 3))
    tokens = torch.cat([words, torch.full((64, 1), END), torch.full((64, 2), PAD)], dim=1)
    model = SequenceVAE.recurrent(12, 8, 16, 48, cell=cell, word_dropout=0.5, beta=LinearSchedule(10_000, end=0.1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        model(tokens).loss.backward()
        optimizer.step()
        model.kl_penalty.step()
    recon = model.reconstruct(tokens)
    assert (recon == tokens).float().mean() > 0.9
    # The bound of more samples is higher, and both are below the most that 64 equally frequent sequences allow for each.
    generator = torch.Generator().manual_seed(0)
    bounds = [model.log_prob_bound(tokens, k, samples_at_once=8, generator=generator).mean().item() for k in (1, 20)]
    assert bounds[0] < bounds[1]
    assert len(model.sample(5, 6)) == 5


def test_the_bound_is_the_mean_of_its_weights():
    model = tiny().double()
    q = model.encode(TOKENS)
    z = q.rsample(6, generator=torch.Generator().manual_seed(0))
    weights = []
    for sample in z:
        logits = model.decode(sample, TOKENS)
        log_px = -F.cross_entropy(logits.mT, TOKENS, ignore_index=PAD, reduction="none").sum(1)
        log_pz = torch.distributions.Normal(0.0, 1.0).log_prob(sample).sum(1)
        log_q = torch.distributions.Normal(q.mu, torch.exp(0.5 * q.logvar)).log_prob(sample).sum(1)
        weights.append(log_px + log_pz - log_q)
    expected = torch.stack(weights).logsumexp(0) - math.log(6)
    bound = model.log_prob_bound(TOKENS, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(bound, expected.detach())


@EACH_CELL
def test_what_it_writes(cell):
    model = tiny(cell=cell)
    drawn = [model.sample(50, 7, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*drawn)
    assert drawn[0].shape == (50, 7)
    for row in drawn[0].tolist():
        end = row.index(END) if END in row else len(row)
        assert not {PAD, BEGIN} & set(row[:end])
        assert set(row[end + 1 :]) <= {PAD}
    assert any(END in row for row in drawn[0].tolist())
    path = model.interpolate(TOKENS[:2], TOKENS[1:], steps=4, max_length=6)
    assert path.shape == (2, 4, 6)
    assert torch.equal(path[:, 0], model.reconstruct(TOKENS)[:2])
    assert torch.equal(path[:, -1], model.reconstruct(TOKENS)[1:])
    assert torch.equal(model.generate(model.encode(TOKENS).mean, 6), model.reconstruct(TOKENS))


def test_other_priors():
    model = tiny(prior=MixturePrior(4, 3))
    output = model(TOKENS)
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(p.grad is not None for p in model.prior.parameters())
    assert model.sample(2, 5).shape == (2, 5)


@EACH_CELL
def test_it_is_stored(cell, tmp_path):
    pytest.importorskip("safetensors")
    model = tiny(cell=cell, beta=LinearSchedule(4), dropout=0.1, init="xavier", spectral_norm=True)
    model(TOKENS)
    model.kl_penalty.step()
    model.save_pretrained(tmp_path)
    loaded = SequenceVAE.from_pretrained(tmp_path)
    assert torch.equal(loaded(TOKENS, EPS).loss, model.eval()(TOKENS, EPS).loss)
    assert torch.equal(loaded.reconstruct(TOKENS), model.reconstruct(TOKENS))


@pytest.mark.parametrize("cell", brief(["gru", "lstm"], ["gru"]))
def test_the_loss_compiles(cell):
    torch.compiler.reset()
    model = tiny(cell=cell)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output, expected = compiled(TOKENS, EPS), model(TOKENS, EPS)
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(*(torch.autograd.grad(o.loss, list(model.parameters())) for o in (output, expected)))


@EACH_CELL
def test_bfloat16(cell):
    model = tiny(cell=cell)
    expected = model(TOKENS, EPS)
    model = model.bfloat16()
    output = model(TOKENS, EPS.bfloat16())
    assert output.recon.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected.loss, rtol=2e-2, atol=0)
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.sample(2, 5).shape == (2, 5)


@EACH_CELL
def test_autocast(cell):
    model = tiny(cell=cell)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(TOKENS, EPS)
    torch.testing.assert_close(output.loss, model(TOKENS, EPS).loss, rtol=2e-2, atol=0)
    output.loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@EACH_CELL
def test_it_runs_without_data(cell):
    with FakeTensorMode():
        output = tiny(cell=cell, word_dropout=0.1)(torch.zeros(5, 6, dtype=torch.int64))
        output.loss.backward()
    assert output.recon.shape == (5, 6, 12)


BAD = {
    "float": (lambda: tiny()(TOKENS.float()), r"tokens: got torch.float32 of shape \(3, 6\), takes integers of shape \(batch, length\)"),
    "vector": (lambda: tiny()(TOKENS[0]), r"tokens: got torch.int64 of shape \(6,\), takes"),
    "special": (lambda: tiny(end=0), r"pad, begin, end, unknown: got \(0, 1, 0, 3\), takes four different integers >= 0"),
    "word_dropout": (lambda: tiny(word_dropout=1.5), r"word_dropout: got 1.5, takes a number in \[0, 1\]"),
    "cell": (lambda: tiny(cell="rnn"), "cell: got 'rnn', takes one of 'gru', 'lstm'"),
    "prior": (lambda: tiny(prior=MixturePrior(5, 3)), r"latent_dim: got 4, the prior is of \(5,\)"),
    "temperature": (lambda: tiny().sample(2, temperature=-0.5), "temperature: got -0.5, takes a number >= 0"),
    "max_length": (lambda: tiny().sample(2, 0), "max_length: got 0, takes an integer of at least 1"),
    "num_samples": (lambda: tiny().log_prob_bound(TOKENS, 0), "num_samples: got 0, takes"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


# The sentences and the command line.


@pytest.fixture
def sentences():
    for package in ("lightning", "jsonargparse", "mlxtend", "PIL"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install fastvae-kernels[train]")
    from fastvae.training import sentences

    return sentences


def test_sentences_are_those_of_the_grammar(sentences):
    data, again, other = (sentences.GrammarSentences(200, seed=seed) for seed in (0, 0, 1))
    x = data.samples("train")["x"]
    assert torch.equal(x, again.samples("train")["x"])
    assert data.source.names != (other.setup() or other.source.names)
    assert len(set(data.source.names)) == 200
    assert data.vocabulary.decode(data.source.x) == data.source.names
    assert torch.equal(data.vocabulary.encode(data.source.names), data.source.x)
    assert (data.source.x == PAD).any()
    assert not (data.source.x == UNKNOWN).any()
    drawn = sentences.draw_sentence(random.Random(1))
    assert set(drawn.split()) <= set(sentences.words_of_grammar())


def test_words_that_are_not_known_and_sentences_that_are_too_long(sentences):
    vocabulary = sentences.GrammarSentences.vocabulary
    tokens = vocabulary.encode(["the dog xylophones", "birds"])
    assert tokens[0, 2] == UNKNOWN
    assert tokens[1].tolist()[1:] == [END, PAD, PAD]
    assert vocabulary.decode(tokens) == ["the dog <unknown>", "birds"]
    with pytest.raises(ValueError, match="length: got 3, takes at least 4"):
        vocabulary.encode(["the dog sleeps"], length=3)
    with pytest.raises(sentences.DataError, match="count: got 0, takes an integer from 1 to 20000"):
        sentences.GrammarSentences(0)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_config_trains_and_the_commands_write_text(sentences, tmp_path, capsys):
    from fastvae.training import cli, commands

    few = ["--trainer.max_steps=3", "--data.count=60", "--data.batch_size=16", "--network.hidden=16", "--trainer.accelerator=cpu"]
    quiet = ["--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}", "--trainer.enable_progress_bar=false"]
    cli.main(["fit", "--config", str(ROOT / "configs/sequence_vae.yaml"), *few, *quiet])
    checkpoint = next(tmp_path.rglob("last.ckpt"))
    commands.main(["sample", str(checkpoint), "--out", str(tmp_path), "--count", "5"])
    commands.main(["interpolate", str(checkpoint), "--out", str(tmp_path), "--count", "2", "--steps", "3"])
    commands.main(["encode", str(checkpoint), "--out", str(tmp_path)])
    capsys.readouterr()
    assert len((tmp_path / "samples.txt").read_text().splitlines()) == 5
    assert len((tmp_path / "interpolations.txt").read_text().splitlines()) == 6
    steps = torch.load(checkpoint, weights_only=True)["state_dict"]["network.kl_penalty.num_steps"]
    assert steps == 3


def test_a_vocabulary_that_is_too_small_is_one_line(sentences, tmp_path):
    from fastvae.training import cli

    options = [
        "--network.num_tokens=20",
        "--data.count=60",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    with pytest.raises(sentences.DataError.__base__, match="network: does not take the samples of GrammarSentences"):
        cli.main(["fit", "--config", str(ROOT / "configs/sequence_vae.yaml"), *options])
