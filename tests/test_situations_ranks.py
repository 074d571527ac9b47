"""What users do with quantizers in two processes: evaluate on one of them, train on unequal data, load a checkpoint on one, drop depth."""

import copy
from functools import partial

import pytest
import torch
from _quantizers import (
    CHECKPOINTS,
    DIM,
    LEARNING,
    Bottleneck,
    assert_same_state,
    batches,
    models,
    quantizer,
    started_layer,
    state_of,
    train,
)
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint


class Counted:
    """Counts the collective calls that run inside it."""

    NAMES = ("all_reduce", "broadcast")

    def __enter__(self):
        self.calls = 0
        self.originals = {name: getattr(distributed, name) for name in self.NAMES}
        for name, original in self.originals.items():
            setattr(distributed, name, partial(self.call, original))
        return self

    def call(self, original, *args, **kwargs):
        self.calls += 1
        return original(*args, **kwargs)

    def __exit__(self, *_):
        for name, original in self.originals.items():
            setattr(distributed, name, original)


QUANTIZERS = {
    "ema": lambda: quantizer(),
    "gradient": lambda: quantizer(update="gradient"),
    "revival": lambda: quantizer(revive_below=0.5, heads=2),
    "revival by gradient": lambda: quantizer(revive_below=0.5, update="gradient"),
    "kmeans": lambda: quantizer(kmeans_iters=2),
    "residual": lambda: quantizer(residual=3, quantizer_dropout=True, revive_below=0.5),
}


def _one_rank_reads(rank, kind):
    """Rank 0 evaluates, checkpoints and reads; then both train, which fails where their collective calls are out of step."""
    torch.manual_seed(0)
    layer = QUANTIZERS[kind]()
    x = batches(2, 24, DIM)[rank]
    layer(x)
    with Counted() as counted:
        if rank == 0:
            layer.eval()(x)
            checkpoint(layer, x.clone().requires_grad_(), use_reentrant=False)[0].sum().backward()
            with torch.inference_mode():
                layer(x)
            layer.train()
    assert counted.calls == 0
    torch.manual_seed(rank)
    for y in batches(3, 24, DIM, seed=rank):
        layer(y)
    return state_of(layer)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_one_rank_evaluates_alone(ranks, kind):
    assert_same_state(*ranks.run(_one_rank_reads, kind))


def _read_a_model_in_training_mode(rank):
    model = models()["VQVAE"]
    x = torch.rand(2, 3, 16, 16)
    model(x)
    with Counted() as counted:
        if rank == 1:
            model.encode(x), model.reconstruct(x), model.decode(model.encode(x))
    model(x)
    return counted.calls, state_of(model.quantizer)


def test_one_rank_reads_a_model_in_training_mode(ranks):
    (first_calls, first), (second_calls, second) = ranks.run(_read_a_model_in_training_mode)
    assert first_calls == second_calls == 0
    assert_same_state(first, second)


def _calls_a_step(rank, kind):
    torch.manual_seed(rank)
    layer, calls = QUANTIZERS[kind](), []
    for x in batches(2, 24, DIM, seed=rank):
        with Counted() as counted:
            layer(x)
        calls.append(counted.calls)
    return calls


# As docs/vector_quantization.md has them.
CALLS = {"ema": [2, 2], "gradient": [1, 1], "revival": [3, 3], "revival by gradient": [3, 3], "kmeans": [2 + 2 + 2 * 2, 2]}


@pytest.mark.parametrize("kind", CALLS)
def test_the_collective_calls_of_a_training_step(ranks, kind):
    assert ranks.run(_calls_a_step, kind) == [CALLS[kind]] * 2


AWKWARD = {
    "empty": lambda x: x[:0],
    "NaN": lambda x: torch.full_like(x, float("nan")),
    "one row": lambda x: x[:1],
    "other size": lambda x: torch.cat([x, x]),
}


def _train_on_unequal_data(rank, kind, awkward, which):
    torch.manual_seed(0)
    layer = QUANTIZERS[kind]()
    torch.manual_seed(rank)
    calls = []
    for x in batches(4, 24, DIM, seed=rank):
        with Counted() as counted:
            layer(AWKWARD[awkward](x) if rank == which else x)
        calls.append(counted.calls)
    return calls, state_of(layer)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_ranks_with_unequal_data_make_the_same_collective_calls(ranks, kind):
    for awkward in AWKWARD:
        for which in (0, 1):
            (first_calls, first), (second_calls, second) = ranks.run(_train_on_unequal_data, kind, awkward, which)
            assert first_calls == second_calls
            assert all(torch.isfinite(tensor).all() for tensor in first.values())
            if "gradient" not in kind:
                assert_same_state(first, second)


def _checkpointed_training(rank, options):
    torch.manual_seed(0)
    plain = Bottleneck(**options)
    checkpointed = copy.deepcopy(plain)
    expected = train(plain, 2, lambda model, x: model(x + rank))
    results = []
    for kind in ("reentrant", "not reentrant"):
        model = copy.deepcopy(checkpointed)
        actual = train(model, 2, lambda model, x, kind=kind: checkpoint(model, x + rank, **CHECKPOINTS[kind]))
        results.append(len(actual) == len(expected) and all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)))
        assert_same_state(state_of(model), state_of(plain))
    return results


@pytest.mark.parametrize("options", LEARNING[2:6] + LEARNING[7:8], ids=str)
def test_a_recomputation_makes_no_collective_call(ranks, options):
    assert ranks.run(_checkpointed_training, options) == [[True, True]] * 2


def _global_evaluation(rank):
    torch.manual_seed(0)
    layer = quantizer(update="gradient", global_evaluation=True).eval()
    x = batches(2, 24, DIM)
    output = layer(x[rank])
    layer.global_evaluation = False
    joined = layer(torch.cat(x))
    return [(o.perplexity, o.usage) for o in (output, joined)]


def test_global_statistics_in_evaluation_on_request(ranks):
    for output, joined in ranks.run(_global_evaluation):
        torch.testing.assert_close(output, joined)


def _resume(rank, way, state):
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(DIM, DIM), quantizer(kmeans_iters=2))
    if rank == 0:
        model[1].load_state_dict(state)
    trained = DistributedDataParallel(model) if way == "DDP" else model
    for x in batches(3, 24, DIM, seed=rank):
        output = trained(x)
        (output.loss + output.quantized.square().mean()).backward()
    return state_of(model[1])


@pytest.mark.parametrize("way", ["DDP", "alone"])
def test_rank_0_loads_a_checkpoint_and_nobody_starts_kmeans_again(ranks, way):
    loaded = state_of(started_layer())
    first, second = ranks.run(_resume, way, loaded)
    assert_same_state(first, second)
    # The averages have moved three steps from those of the file, where k-means would have replaced them.
    expected = 0.7**3 * loaded["ema_sum"].sum()
    assert abs(first["ema_sum"].sum() - expected) < 0.2 * abs(expected)


def _depths(rank, kind):
    torch.manual_seed(10 + rank)
    layer = QUANTIZERS[kind]()
    depths = []
    for x in batches(12, 10, DIM, seed=rank):
        indices = layer(x)[1]
        depths.append(int((indices >= 0).all(0).sum()))
    return depths


def test_depth_dropout_takes_the_same_steps_on_all_ranks(ranks):
    first, second = ranks.run(_depths, "residual")
    assert first == second
    assert len(set(first)) > 1


def _ddp_with_depth_dropout(rank):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(DIM, DIM), quantizer(residual=3, quantizer_dropout=True, update="gradient"))
    trained = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters())
    torch.manual_seed(rank)
    for x in batches(8, 10, DIM, seed=rank):
        optimizer.zero_grad()
        output = trained(x)
        (output.loss + output.quantized.square().mean()).backward()
        optimizer.step()
    return state_of(model), [p.grad is not None for p in model.parameters()]


def test_codebooks_that_a_step_leaves_out_have_a_gradient_of_0(ranks):
    (first, gradients), (second, _) = ranks.run(_ddp_with_depth_dropout)
    assert all(gradients)
    # Each rank's moving counts follow both ranks; the parameters are those of DistributedDataParallel.
    assert_same_state(first, second)
