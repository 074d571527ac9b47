"""Disentanglement metrics: hand-computed cases, perfect and random codes, disent's scores, and the bounded sample behind them."""

import math
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch
from _disent import (
    CASES,
    GROUP_SIZE,
    NUM_GROUPS,
    NUM_TEST,
    NUM_TRAIN,
    draw_importance,
    draw_samples,
    stored_scores,
    their_importance_scores,
    their_scores,
)
from sklearn.metrics import mutual_info_score
from torch import Tensor

from fastvae.metrics._groups import group_by_value
from fastvae.metrics._mutual_information import discretize, histogram_information
from fastvae.metrics._representation import Representation, split
from fastvae.metrics._row_hash import hash_rows
from fastvae.metrics._samples import SampledMetric
from fastvae.metrics.dci import DCI, importance_scores
from fastvae.metrics.intervention_scores import BetaVAEScore, FactorVAEScore, accuracy_of_votes, count_votes
from fastvae.metrics.mig import MutualInformationGap
from fastvae.metrics.modularity import Explicitness, Modularity, modularity
from fastvae.metrics.sap import SAPScore, accuracies, predictability_gap, squared_correlation

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = (2, 3, 4)
METRICS = {
    "mig_histogram": MutualInformationGap,
    "mig_neighbors": partial(MutualInformationGap, "neighbors"),
    "modularity": Modularity,
    "explicitness": partial(Explicitness, 400, 200),
    "sap": partial(SAPScore, 400, 200, continuous=True),
    "dci_disentanglement": partial(DCI, 400, 200),
    "beta_vae_score": partial(BetaVAEScore, 200, 100, group_size=16),
    "factor_vae_score": partial(FactorVAEScore, 200, 100, group_size=16),
}
each_metric = pytest.mark.parametrize("name", METRICS)
each_case = pytest.mark.parametrize("case", CASES)


def factors_of(count: int = 600, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(size, (count,), generator=generator) for size in SIZES], 1)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def scores(metric: SampledMetric, codes: Tensor, factors: Tensor, batch_size: int = 1000) -> dict[str, Tensor]:
    for batch in zip(codes.split(batch_size), factors.split(batch_size), strict=True):
        metric.update(*batch)
    return metric.compute()


def case_tensors(case: str) -> tuple[Tensor, Tensor]:
    codes, factors = draw_samples(CASES[case])
    return torch.from_numpy(codes), torch.from_numpy(factors)


class Kept(SampledMetric):
    """The sample itself."""

    fields: ClassVar = {"codes": torch.float64, "factors": torch.int64}

    def update(self, codes: Tensor, factors: Tensor) -> None:
        self.add_samples(codes=codes, factors=factors)

    def compute(self) -> dict[str, Tensor]:
        return self.samples()


# The bounded sample.


def test_all_samples_are_kept_up_to_the_limit():
    codes, factors = noise(50, 2), factors_of(50)
    kept = scores(Kept(50), codes, factors, 7)
    order = kept["codes"][:, 0].argsort()
    assert torch.equal(kept["codes"][order], codes[codes[:, 0].argsort()])
    assert torch.equal(kept["factors"][order], factors[codes[:, 0].argsort()])


@pytest.mark.parametrize("limit", [10, 100, 1000])
def test_the_sample_depends_on_no_batch_size_and_no_order(limit):
    codes, factors = noise(300, 2), factors_of(300)
    codes, factors = torch.cat([codes, codes[:50], codes[:20]]), torch.cat([factors, factors[:50], factors[:20]])
    expected = scores(Kept(limit), codes, factors)
    assert len(expected["codes"]) == min(limit, 370)
    shuffled = torch.randperm(370, generator=torch.Generator().manual_seed(1))
    for batch_size in (1, 7, 100):
        kept = scores(Kept(limit), codes[shuffled], factors[shuffled], batch_size)
        assert all(torch.equal(kept[name], expected[name]) for name in expected)


def test_the_sample_is_a_fair_draw():
    values = torch.arange(20_000.0)[:, None]
    kept = scores(Kept(1000), values, torch.zeros(20_000, 1, dtype=torch.int64))["codes"][:, 0]
    assert len(kept.unique()) == 1000
    # Each tenth has 100 of the kept; the standard deviation is below 10.
    assert ((kept / 2000).long().bincount(minlength=10) - 100).abs().max() < 40
    # Their order tells nothing of their values either.
    assert abs(np.corrcoef(kept, np.arange(1000))[0, 1]) < 4 / math.sqrt(1000)


def test_samples_that_come_often_count_as_often():
    codes = torch.tensor([[1.0], [2.0], [3.0]]).repeat_interleave(torch.tensor([100, 200, 700]), 0)
    factors = torch.zeros(1000, 1, dtype=torch.int64)
    for limit, expected in ((1000, [100, 200, 700]), (10, [1, 2, 7])):
        kept = scores(Kept(limit), codes, factors, 30)["codes"][:, 0]
        assert kept.long().bincount()[1:].tolist() == expected


def test_equal_zeros_are_one_sample_and_dtypes_do_not_matter():
    factors = torch.zeros(2, 1, dtype=torch.int32)
    mixed = Kept(10)
    mixed.update(torch.tensor([[0.0], [0.5]]), factors)
    mixed.update(torch.tensor([[-0.0], [0.5]], dtype=torch.float16), factors.to(torch.uint8))
    kept = mixed.compute()
    assert kept["codes"].dtype == torch.float64
    assert kept["factors"].dtype == torch.int64
    assert torch.equal(kept["codes"].sort(0).values, torch.tensor([[0.0], [0.0], [0.5], [0.5]], dtype=torch.float64))
    assert len(mixed._distinct()) == 2


def test_memory_is_bounded():
    metric = Kept(20)
    for seed in range(200):
        metric(noise(5, 3) + seed, factors_of(5))
        assert sum(map(len, metric.rows)) <= 2 * 20 * (2 + 3 + 3)


def test_keys_are_spread_evenly():
    keys = hash_rows(torch.arange(100_000)[:, None])
    assert len(keys.unique()) == len(keys)
    bits = (keys[:, None] >> torch.arange(64)) & 1
    assert (bits.double().mean(0) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(len(keys))
    # Columns are not interchangeable.
    assert hash_rows(torch.tensor([[1, 2]])) != hash_rows(torch.tensor([[2, 1]]))


def test_reset_forgets_samples_and_widths():
    metric = Kept(10)
    metric.update(noise(3, 2), factors_of(3))
    metric.reset()
    metric.update(noise(4, 5), factors_of(4)[:, :1])
    assert metric.compute()["codes"].shape == (4, 5)


def _rank_scores(rank: int, name: str, shares: list[slice]) -> dict[str, Tensor]:
    codes, factors = factors_of().double() + 0.3 * noise(600, 3), factors_of()
    metric = METRICS[name]()
    if len(codes[shares[rank]]):
        metric.update(codes[shares[rank]], factors[shares[rank]])
    return metric.compute()


@pytest.mark.parametrize("shares", [[slice(0, 450), slice(450, None)], [slice(0, 0), slice(None)]], ids=["unequal", "one without data"])
def test_two_processes_compute_what_one_does(ranks, shares):
    for name in ("mig_histogram", "factor_vae_score"):
        expected = _rank_scores(0, name, [slice(None)])
        assert ranks.run(_rank_scores, name, shares) == [expected, expected]


def _rank_error(rank: int) -> str:
    metric = MutualInformationGap()
    metric.update(noise(5, 2 + rank), factors_of(5))
    with pytest.raises(ValueError, match="dim") as caught:
        metric.compute()
    assert isinstance(metric.rows, list)
    return str(caught.value)


def test_processes_with_codes_of_other_dims_are_told(ranks):
    message = "add_samples: got tensors of dim [[2, 3], [3, 3]] in the processes, takes the same in all"
    assert ranks.run(_rank_error) == [message, message]


# Each metric.


@each_metric
def test_the_identity_scores_high(name):
    factors = factors_of()
    result = scores(METRICS[name](), factors.double(), factors)
    assert result[name].dtype == torch.float64
    assert result[name].shape == ()
    assert 0.9 <= result[name] <= 1 + 1e-9


@each_metric
def test_codes_of_noise_score_low(name):
    result = scores(METRICS[name](), noise(600, 3), factors_of())
    # Chance is 1/3 for the scores that guess one of three factors, and 1/2 for areas. Without information, the bias of the histogram
    # makes the modularity an arbitrary number.
    limits = {"explicitness": 0.6, "beta_vae_score": 0.5, "factor_vae_score": 0.5, "modularity": 0.9, "dci_disentanglement": 0.4}
    assert 0 <= result[name] <= limits.get(name, 0.2)


def test_mixed_codes_have_a_small_gap():
    rotation = torch.linalg.qr(noise(3, 3)).Q
    codes = (factors_of(2000).double() / torch.tensor(SIZES)) @ (torch.ones(3, 3, dtype=torch.float64) / 3 + 0.1 * rotation)
    assert scores(MutualInformationGap(), codes, factors_of(2000))["mig_histogram"] <= 0.2
    assert scores(MutualInformationGap("neighbors"), codes, factors_of(2000))["mig_neighbors"] <= 0.2


@each_metric
def test_scores_depend_on_no_batch_size_and_no_order(name):
    codes, factors = factors_of().double() + 0.3 * noise(600, 3), factors_of()
    expected = scores(METRICS[name](), codes, factors)
    shuffled = torch.randperm(600, generator=torch.Generator().manual_seed(1))
    assert scores(METRICS[name](), codes[shuffled], factors[shuffled], 37) == expected


# To a continuous factor, values are numbers.
@pytest.mark.parametrize("name", sorted(METRICS.keys() - {"sap"}))
def test_the_numbering_of_values_does_not_matter(name):
    codes, factors = factors_of().double() + 0.3 * noise(600, 3), factors_of()
    # The keys differ, and with them the split.
    renamed = scores(METRICS[name](), codes, factors * 10 - 7)[name]
    torch.testing.assert_close(renamed, scores(METRICS[name](), codes, factors)[name], rtol=0, atol=0.08)


@each_metric
def test_constant_codes_give_numbers(name):
    result = scores(METRICS[name](), torch.ones(600, 3), factors_of())
    assert all(value.isfinite() for value in result.values())
    # Chance is a third for the scores that guess a factor; scikit-learn breaks ties by noise before it looks for neighbours.
    limits = {"explicitness": 0.5, "beta_vae_score": 0.5, "mig_neighbors": 0.1}
    assert 0 <= result[name] <= limits.get(name, 0)


# Mutual information.


def test_bins_are_those_of_a_histogram():
    codes = torch.cat([noise(500, 3), torch.linspace(0, 1, 500, dtype=torch.float64)[:, None]], 1)
    bins = discretize(codes, 20)
    for column, values in enumerate(codes.T.numpy()):
        assert torch.equal(bins[:, column].bincount(minlength=20), torch.from_numpy(np.histogram(values, 20)[0]))
    assert discretize(torch.full((3, 1), 0.1), 20).unique().numel() == 1


def test_information_is_that_of_scikit_learn():
    factors = factors_of()
    codes = factors.double() @ noise(3, 5) + 0.1 * noise(600, 5)
    information = histogram_information(codes, factors, 7)
    bins = discretize(codes, 7)
    expected = [[mutual_info_score(bins[:, i], factors[:, j]) for j in range(3)] for i in range(5)]
    torch.testing.assert_close(information, torch.tensor(expected, dtype=torch.float64))


def test_the_gap_of_a_code_that_knows_half():
    """Four values in the first code, and their upper bit in the second: (ln 4 - ln 2) / ln 4."""
    factor = torch.arange(4).repeat(25)[:, None]
    codes = torch.cat([factor, factor // 2], 1).double()
    assert scores(MutualInformationGap(), codes, factor)["mig_histogram"].item() == pytest.approx(0.5)
    # Three bins join two of the values, which leaves (1/4 + 1/4) ln 4 + 1/2 ln 2 in the first code.
    assert scores(MutualInformationGap(num_bins=3), codes, factor)["mig_histogram"].item() == pytest.approx(0.25)


def test_more_values_than_bins_bound_the_gap():
    factor = torch.arange(40).repeat(25)[:, None]
    codes = torch.cat([factor.double(), torch.zeros(1000, 1)], 1)
    assert scores(MutualInformationGap(), codes, factor)["mig_histogram"].item() == pytest.approx(math.log(20) / math.log(40))


def test_the_estimator_is_named():
    assert repr(MutualInformationGap()) == "MutualInformationGap(estimator='histogram', num_bins=20)"
    assert repr(MutualInformationGap("neighbors")) == "MutualInformationGap(estimator='neighbors')"


@pytest.mark.parametrize(
    ("information", "expected"),
    [([[1, 0], [0, 2]], 1), ([[3, 3], [1, 1]], 0), ([[2, 1]], 0.75), ([[0, 1], [0, 0]], 0.5), ([[2, 1, 1]], 1 - 0.5 / 2)],
)
def test_modularity_by_hand(information, expected):
    assert modularity(torch.tensor(information, dtype=torch.float64)).item() == pytest.approx(expected)


# DCI.


@pytest.mark.parametrize(
    ("importance", "disentanglement", "completeness"),
    [
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], 1, 1),
        ([[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]], 0, 0),
        # Two of four codes have all factors.
        ([[0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [0, 0, 0], [0, 0, 0]], 0, 1 - math.log(2) / math.log(4)),
        # Each factor is in one code; the first code has two of three factors and two thirds of the weight.
        ([[1, 1, 0], [0, 0, 1], [0, 0, 0]], 2 / 3 * (1 - math.log(2) / math.log(3)) + 1 / 3, 1),
        # Each factor is in two codes of its own.
        ([[0.5, 0], [0.5, 0], [0, 0.5], [0, 0.5]], 1, 1 - math.log(2) / math.log(4)),
        # No code matters for the second factor.
        ([[1, 0], [0, 0]], 1, 0.5),
        ([[0, 0], [0, 0]], 0, 0),
    ],
)
def test_dci_by_hand(importance, disentanglement, completeness):
    found = importance_scores(torch.tensor(importance, dtype=torch.float64))
    assert [value.item() for value in found] == pytest.approx([disentanglement, completeness], abs=1e-12)


def test_a_code_of_two_factors_is_not_disentangled():
    factors = torch.stack([torch.arange(600) % 2, torch.arange(600) // 2 % 2], 1)
    codes = torch.cat([(2 * factors[:, :1] + factors[:, 1:]).double(), noise(600, 1)], 1)
    result = scores(DCI(400, 200), codes, factors)
    assert result["dci_disentanglement"] < 0.1
    assert result["dci_completeness"] > 0.9
    assert result["dci_informativeness_test"] == 1


# SAP.


def test_the_sap_of_two_balanced_values_is_a_half():
    factors = torch.stack([torch.arange(600) % 2, torch.arange(600) // 2 % 2], 1)
    # The second code guesses the first factor right half of the time, up to the chances of the split.
    assert scores(SAPScore(400, 200), factors.double(), factors)["sap"].item() == pytest.approx(0.5, abs=0.1)


def test_the_squared_correlation_by_hand():
    codes = torch.tensor([[0.0, 1.0, 5.0], [1.0, 1.0, 5.0], [2.0, 4.0, 5.0]], dtype=torch.float64)
    factors = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    # The second code deviates by -1, -1, 2: 3^2 / (2 * 6).
    assert squared_correlation(codes, factors).flatten().tolist() == pytest.approx([1, 0.75, 0])
    assert predictability_gap(squared_correlation(codes, factors)).item() == pytest.approx(0.25)


# Scores of groups.


def test_groups_share_the_value_of_their_factor():
    factors, generator = factors_of(200), torch.Generator().manual_seed(0)
    for column, groups in enumerate(group_by_value(factors, 2)):
        first, second = groups.pairs(50, 8, generator)
        assert first.shape == second.shape == (50, 8)
        assert torch.equal(factors[first, column], factors[second, column])
        assert (first != second).all()
        members = groups.members(50, 8, generator)
        assert (factors[members, column] == factors[members[:, :1], column]).all()
        # Every sample takes part, and every value of a factor.
        assert len(first.unique()) > 150
        assert len(second.unique()) > 150
        assert len(factors[members[:, 0], column].unique()) == SIZES[column]


def test_values_with_few_samples_have_no_groups():
    factors = torch.tensor([0] * 5 + [1] * 2)[:, None]
    (groups,) = group_by_value(factors, 3)
    assert groups.members(100, 4, torch.Generator().manual_seed(0)).max() == 4


def test_votes_by_hand():
    # Code 0 varies least in the groups of factor 0, and once in one of factor 1; code 1 in the other of factor 1.
    variances = torch.tensor([[0.1, 0.2], [0.1, 0.3], [0.2, 0.4], [0.5, 0.2]])
    votes = count_votes(variances, torch.tensor([0, 0, 1, 1]), 3)
    assert votes.tolist() == [[2, 1, 0], [0, 1, 0]]
    assert accuracy_of_votes(votes, votes) == 0.75


def test_codes_that_hardly_vary_do_not_vote():
    factors = factors_of()
    codes = torch.cat([factors.double(), 0.01 * noise(600, 2)], 1)
    assert scores(FactorVAEScore(50, 50, group_size=8), codes, factors)["factor_vae_active_codes"] == 3
    assert scores(FactorVAEScore(50, 50, group_size=8, prune_threshold=0.0), codes, factors)["factor_vae_active_codes"] == 5


@pytest.mark.parametrize("score", [BetaVAEScore, FactorVAEScore])
def test_the_scale_of_a_code_does_not_matter(score):
    codes, factors = factors_of().double() + 0.6 * noise(600, 3), factors_of()
    scaled = scores(score(400, 400, group_size=16), codes * torch.tensor([1.0, 1000.0, 0.3]), factors)
    for name, value in scores(score(400, 400, group_size=16), codes, factors).items():
        assert scaled[name].item() == pytest.approx(value.item(), abs=0.06)


# The scores of disent.


@each_case
def test_scores_without_chance_are_those_of_disent(case):
    codes, factors = case_tensors(case)
    expected = stored_scores()[case]
    assert scores(MutualInformationGap(), codes, factors)["mig_histogram"].item() == pytest.approx(expected["mig"], abs=1e-9)
    assert scores(SAPScore(continuous=True), codes, factors)["sap"].item() == pytest.approx(expected["continuous sap"], abs=1e-9)


@each_case
def test_sap_on_the_same_split_is_that_of_disent(case):
    codes, factors = draw_samples(CASES[case])
    parts = [accuracies((codes[:NUM_TRAIN], values[:NUM_TRAIN]), (codes[NUM_TRAIN:], values[NUM_TRAIN:])) for values in factors.T]
    gap = predictability_gap(torch.from_numpy(np.stack(parts, 1)))
    assert gap.item() == pytest.approx(stored_scores()[case]["sap"], abs=1e-9)


@each_case
def test_scores_of_random_splits_and_groups_are_near_those_of_disent(case):
    codes, factors = case_tensors(case)
    expected = stored_scores()[case]
    sap = scores(SAPScore(NUM_TRAIN, NUM_TEST), codes, factors)["sap"].item()
    # The mean of three differences of accuracies on 500 samples, from two splits: a standard error of up to 0.025.
    assert sap == pytest.approx(expected["sap"], abs=0.08)
    groups = FactorVAEScore(NUM_GROUPS, NUM_GROUPS, group_size=GROUP_SIZE, prune_threshold=0.0)
    # Two shares of 1,000 groups: a standard error of up to 0.022.
    assert scores(groups, codes, factors)["factor_vae_score"].item() == pytest.approx(expected["factor vae"], abs=0.07)


@each_case
def test_dci_is_near_that_of_disent(case):
    codes, factors = case_tensors(case)
    expected = stored_scores()[case]
    result = scores(DCI(NUM_TRAIN, NUM_TEST), codes, factors)
    # Trees by histograms grow by another criterion than exact ones; on the same split, D and C differed by up to 0.06.
    assert result["dci_disentanglement"].item() == pytest.approx(expected["disentanglement"], abs=0.08)
    assert result["dci_completeness"].item() == pytest.approx(expected["completeness"], abs=0.08)
    # The mean of three accuracies on 500 samples, from two splits: a standard error of up to 0.02.
    assert result["dci_informativeness_test"].item() == pytest.approx(expected["informativeness"], abs=0.06)


def test_importance_scores_are_those_of_disent():
    disentanglement, completeness = importance_scores(torch.from_numpy(draw_importance()))
    expected = stored_scores()["importance"]
    # disent adds 1e-11 to each importance.
    assert disentanglement.item() == pytest.approx(expected["disentanglement"], abs=1e-8)
    assert completeness.item() == pytest.approx(expected["completeness"], abs=1e-8)


def test_the_table_is_what_disent_gives():
    assert stored_scores().keys() == {*CASES, "importance"}
    pytest.importorskip("disent", reason="disent is not installed: pip install --no-deps disent==0.8.0")
    assert their_importance_scores() == pytest.approx(stored_scores()["importance"])
    for case, encoder in CASES.items():
        # The trees of boosting take a random order of the codes where splits tie.
        assert their_scores(encoder) == pytest.approx(stored_scores()[case], abs=0.02)


# Wrong input.


def test_splits_are_disjoint_and_shrink_in_proportion():
    data = Representation(torch.arange(90.0).double()[:, None], torch.arange(90)[:, None] % 2)
    train, test = split(data, 20, 10, 0)
    assert len(train.codes) == 20
    assert len(test.codes) == 10
    assert not set(train.codes.flatten().tolist()) & set(test.codes.flatten().tolist())
    train, test = split(data, 2000, 1000, 0)
    assert len(train.codes) == 60
    assert len(test.codes) == 30
    assert not torch.equal(train.codes, split(data, 2000, 1000, 1)[0].codes)


@pytest.mark.parametrize(
    ("codes", "factors", "error", "message"),
    [
        (torch.zeros(3), factors_of(3), ValueError, r"codes: got shape \(3,\), takes \(batch, dim\) with dim > 0"),
        (torch.zeros(3, 0), factors_of(3), ValueError, r"codes: got shape \(3, 0\), takes \(batch, dim\) with dim > 0"),
        (torch.zeros(3, 2), factors_of(3)[:, 0], ValueError, r"factors: got shape \(3,\), takes \(batch, dim\)"),
        (torch.zeros(3, 2).long(), factors_of(3), TypeError, r"codes: got torch.int64, takes a floating dtype"),
        (torch.zeros(3, 2), factors_of(3).double(), TypeError, r"factors: got torch.float64, takes integers"),
        (torch.zeros(3, 2), factors_of(4), ValueError, r"codes, factors: got batches of 3, 4, takes one size for all"),
        (torch.full((3, 2), math.nan), factors_of(3), ValueError, r"codes: got values that are not finite"),
    ],
)
def test_wrong_batches_are_named(codes, factors, error, message):
    with pytest.raises(error, match=message):
        MutualInformationGap().update(codes, factors)


def test_a_change_of_dim_is_named():
    metric = MutualInformationGap()
    metric.update(noise(3, 2), factors_of(3))
    with pytest.raises(ValueError, match=r"codes: got dim 5, takes 2 as in earlier batches"):
        metric.update(noise(3, 5), factors_of(3))


@pytest.mark.parametrize(
    ("metric", "codes", "factors", "message"),
    [
        (MutualInformationGap, noise(1, 2), factors_of(1), r"MutualInformationGap: got 1 samples, takes at least 2"),
        (MutualInformationGap, noise(9, 1), factors_of(9), r"codes: got dim 1, takes at least 2"),
        (DCI, noise(9, 2), factors_of(9)[:, :1], r"factors: got dim 1, takes at least 2"),
        (SAPScore, noise(9, 2), torch.zeros(9, 1).long(), r"factors: column 0 has one value in the samples, takes at least 2"),
        (Explicitness, noise(4, 2), torch.tensor([[0], [0], [0], [1]]), r"factors: column 0 has one value in the (training|test) samples"),
        (
            Explicitness,
            noise(9, 2),
            torch.arange(9)[:, None],
            r"factors: no value of a factor is in both the training and the test samples",
        ),
        (BetaVAEScore, noise(4, 2), torch.arange(4)[:, None].repeat(1, 2), r"column 0 has at most 1 samples with one value, takes 2"),
        (FactorVAEScore, noise(90, 2), factors_of(90), r"column 0 has at most 51 samples with one value, takes 64"),
    ],
)
def test_samples_that_give_no_score_are_named(metric, codes, factors, message):
    metric = metric()
    metric.update(codes, factors)
    with pytest.raises(ValueError, match=message):
        metric.compute()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Kept(0), r"max_samples: got 0, takes an integer of at least 1"),
        (lambda: MutualInformationGap("kde"), r"estimator: got 'kde', takes one of 'histogram', 'neighbors'"),
        (lambda: MutualInformationGap(num_bins=0), r"num_bins: got 0, takes an integer of at least 1"),
        (lambda: Modularity(num_bins=1.5), r"num_bins: got 1.5, takes an integer of at least 1"),
        (lambda: DCI(0), r"num_train: got 0, takes"),
        (lambda: SAPScore(10, 0), r"num_test: got 0, takes"),
        (lambda: Explicitness(-1), r"num_train: got -1, takes"),
        (lambda: BetaVAEScore(group_size=0), r"group_size: got 0, takes"),
        (lambda: FactorVAEScore(group_size=1), r"group_size: got 1, the variance takes an integer of at least 2"),
        (lambda: FactorVAEScore(prune_threshold=-1.0), r"prune_threshold: got -1.0, takes a number >= 0"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
