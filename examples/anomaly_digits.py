"""One digit is left out of training and looked for among the others by its reconstruction error: ROC and precision-recall curves.

    python examples/anomaly_digits.py [--digits 0 1 ... 9] [--epochs 30] [--out out]

Writes anomaly_curves.png, anomaly_scores.png and anomaly.json.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve
from torch import Tensor
from tqdm import tqdm

from fastvae.models import AE
from fastvae.training.datasets import MNISTDigits

LATENT_DIM, VALIDATION = 8, 400


class Scores(NamedTuple):
    """Of the test images: anomaly scores and which images are anomalies; and the threshold from validation images."""

    scores: Tensor
    anomalies: Tensor
    threshold: float


def train(model: AE, images: Tensor, epochs: int, name: str) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in tqdm(range(epochs), desc=name, unit="epoch"):
        for batch in torch.randperm(len(images)).split(128):
            optimizer.zero_grad()
            model(images[batch]).loss.backward()
            optimizer.step()


def score_with_one_digit_out(digit: int, epochs: int) -> Scores:
    """Trains on the other nine digits; the threshold passes 95 % of validation images that the training did not see."""
    digits = MNISTDigits(val=0.0)
    train_digits, test_digits = digits.samples("train"), digits.samples("test")
    torch.manual_seed(0)
    normal = train_digits["x"][train_digits["label"] != digit] / 255
    model = AE.mlp(latent_dim=LATENT_DIM)
    train(model, normal[VALIDATION:], epochs, f"without {digit}")
    threshold = model.fit_threshold(normal[:VALIDATION], quantile=0.95).item()
    return Scores(model.anomaly_score(test_digits["x"] / 255), test_digits["label"] == digit, threshold)


def summarise(result: Scores) -> dict[str, float]:
    found = result.scores > result.threshold
    return {
        "AUC-ROC": float(roc_auc_score(result.anomalies, result.scores)),
        "AUC-PR": float(average_precision_score(result.anomalies, result.scores)),
        "share of anomalies": result.anomalies.float().mean().item(),
        "found above the threshold": found[result.anomalies].float().mean().item(),
        "false alarms": found[~result.anomalies].float().mean().item(),
    }


def draw_curves(path: Path, results: dict[int, Scores], report: dict[int, dict[str, float]]) -> None:
    figure, (roc, pr) = plt.subplots(1, 2, figsize=(11, 5))
    for digit, result in results.items():
        false, true, _ = roc_curve(result.anomalies, result.scores)
        roc.plot(false, true, label=f"{digit}: {report[digit]['AUC-ROC']:.2f}")
        precision, recall, _ = precision_recall_curve(result.anomalies, result.scores)
        pr.plot(recall, precision, label=f"{digit}: {report[digit]['AUC-PR']:.2f}")
    roc.plot([0, 1], [0, 1], color="gray", linestyle=":")
    share = next(iter(report.values()))["share of anomalies"]
    pr.axhline(share, color="gray", linestyle=":")
    roc.set(xlabel="false positive rate", ylabel="true positive rate", title="ROC, area under the curve by left-out digit")
    pr.set(xlabel="recall", ylabel="precision", title="precision and recall, area under the curve")
    for axis in (roc, pr):
        axis.legend(title="digit", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_scores(path: Path, results: dict[int, Scores]) -> None:
    figure, axes = plt.subplots(1, len(results), figsize=(2.4 * len(results), 2.6), sharey=True, squeeze=False)
    for axis, (digit, result) in zip(axes[0], results.items(), strict=True):
        bins = torch.linspace(0, float(result.scores.max()), 40).tolist()
        for anomalies, label in ((False, "others"), (True, "left out")):
            axis.hist(result.scores[result.anomalies == anomalies], bins=bins, density=True, alpha=0.6, label=label)
        axis.axvline(result.threshold, color="black", linestyle="--", linewidth=1)
        axis.set(title=f"digit {digit}", xlabel="squared error")
    axes[0][0].set_ylabel("density")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--digits", type=int, nargs="+", default=list(range(10)), choices=range(10))
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = {digit: score_with_one_digit_out(digit, arguments.epochs) for digit in arguments.digits}
    report = {digit: summarise(result) for digit, result in results.items()}
    for digit, values in report.items():
        print(digit, {name: round(value, 3) for name, value in values.items()})
    (arguments.out / "anomaly.json").write_text(json.dumps(report, indent=2) + "\n")
    draw_curves(arguments.out / "anomaly_curves.png", results, report)
    draw_scores(arguments.out / "anomaly_scores.png", results)


if __name__ == "__main__":
    main()
