"""The soft methods beyond text: scikit-learn's bundled digits (1,797 real 8x8 images), no download.

    python glue_scripts/run_vision.py
    python glue_scripts/run_vision.py --experiments untrained --seeds 0 1 2 3 4

`untrained`: Gumbel looks for a subnetwork of a small convolutional net whose weights stay at their initialisation,
with and without Smart Rescale and the signed constant. `resnet`: a small ResNet is trained dense and then pruned for
the same number of steps by magnitude and by PDP, to 1:4 and to half of its channels. Accuracy on 600 images held out
of the start is read once a run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments, set_seed

from hf_maskselect import PruningConfig, PruningTrainer
from hf_maskselect.utils.tables import text_table

CLASSES, TEST_ROWS = 10, 600
UNTRAINED = {
    "neither": {"gumbel_rescale": False, "gumbel_signed_constant": False},
    "Smart Rescale": {"gumbel_rescale": True, "gumbel_signed_constant": False},
    "signed constant": {"gumbel_rescale": False, "gumbel_signed_constant": True},
    "both (the default)": {"gumbel_rescale": True, "gumbel_signed_constant": True},
}
PATTERNS = {"1:4": {"pattern": "1:4"}, "half of the channels": {"pattern": "channel", "sparsity": 0.5}}


class ConvNet(nn.Module):
    """Two 3x3 convolutions, a pool, three linear layers, as the paper's Conv2, with weights from Kaiming's normal."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(1024, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, CLASSES)),
        )
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.layers(pixel_values)
        return (
            {"logits": logits}
            if labels is None
            else {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
        )


def digits(seed: int) -> tuple[list[dict], list[dict]]:
    """Train and test rows."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    rows = [{"pixel_values": image, "labels": int(label)} for image, label in zip(pixels, labels, strict=True)]
    return train_test_split(rows, test_size=TEST_ROWS, random_state=seed, stratify=labels)


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def run(model: nn.Module, seed: int, kind: type[Trainer] = Trainer, **fields) -> dict[str, float]:
    """Train on the digits (not at all for `max_steps=0`) and evaluate once, its printing swallowed."""
    train, test = digits(seed)
    config = PruningConfig if kind is PruningTrainer else TrainingArguments
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        arguments = config(
            output_dir=folder,
            per_device_train_batch_size=64,
            per_device_eval_batch_size=200,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
            **fields,
        )
        trainer = kind(model, arguments, train_dataset=train, eval_dataset=test, compute_metrics=accuracy)
        if fields["max_steps"]:
            trainer.train()
        return {"eval_sparsity": 0.0, **trainer.evaluate()}


def resnet() -> ResNetForImageClassification:
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1]}
    config = ResNetConfig(**sizes, layer_type="basic", num_channels=1, num_labels=CLASSES)
    # The stem of ResNet shrinks its input four times, which leaves an 8x8 image nothing: keep its first step only.
    model = ResNetForImageClassification(config)
    model.resnet.embedder.pooler = nn.Identity()
    return model


def untrained_jobs(args: argparse.Namespace) -> dict[str, Callable[[int], dict[str, float]]]:
    """Name of each row -> seed -> results."""

    def net(seed: int) -> ConvNet:
        set_seed(seed)
        return ConvNet()

    def subnetwork(seed: int, options: dict[str, bool]) -> dict[str, float]:
        fields = {"method": "gumbel", "gumbel_untrained": True, "target_modules": [".*"], "gumbel_learning_rate": 0.1}
        return run(net(seed), seed, PruningTrainer, max_steps=args.steps, **fields, **options)

    jobs = {name: lambda seed, o=options: subnetwork(seed, o) for name, options in UNTRAINED.items()}
    jobs = {f"untrained, subnetwork, {name}": job for name, job in jobs.items()}
    return {"untrained, nothing pruned": lambda seed: run(net(seed), seed, max_steps=0), **jobs}


def resnet_jobs(args: argparse.Namespace) -> dict[str, Callable[[int], dict[str, float]]]:
    """Name of each row -> seed -> results; all start from the same dense model of their seed."""
    dense: dict[int, dict[str, Tensor]] = {}

    def start(seed: int) -> dict[str, float]:
        set_seed(seed)
        model = resnet()
        found = run(model, seed, max_steps=args.steps, learning_rate=3e-3)
        dense[seed] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return found

    def pruned(seed: int, fields: dict) -> dict[str, float]:
        model = resnet()
        model.load_state_dict(dense[seed])
        return run(model, seed, PruningTrainer, max_steps=args.steps, learning_rate=1e-3, **fields)

    jobs = {"ResNet, dense": start}
    for name, pattern in PATTERNS.items():
        for method in ("magnitude", "pdp"):
            fields = {"method": method, **pattern}
            jobs[f"ResNet, {name}, {method}"] = lambda seed, f=fields: pruned(seed, f)
    return jobs


def main() -> None:
    """Run the experiments and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", nargs="+", choices=("untrained", "resnet"), default=["untrained", "resnet"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of every training")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    made = {"untrained": untrained_jobs, "resnet": resnet_jobs}
    jobs = {name: job for experiment in args.experiments for name, job in made[experiment](args).items()}
    rows = []
    with tqdm(total=len(jobs) * len(args.seeds), desc="digits", unit="run") as bar:
        for name, job in jobs.items():
            found = []
            for seed in args.seeds:
                found.append(job(seed))
                bar.update()
            scores = [100 * f["eval_accuracy"] for f in found]
            spread = f"{statistics.stdev(scores):.1f}" if len(scores) > 1 else "-"
            sparsity = statistics.mean(f["eval_sparsity"] for f in found)
            rows.append([name, f"{sparsity:.4f}", f"{statistics.mean(scores):.1f}", spread, len(scores)])
    table = text_table(["run", "sparsity", "test accuracy", "sd", "seeds"], rows)
    print("\n" + table)
    if args.output:
        args.output.write_text(table + "\n")


if __name__ == "__main__":
    main()
