"""Soft methods on images: the digits of scikit-learn (1,797 real 8x8 images), without a download.

    python glue_scripts/run_vision.py
    python glue_scripts/run_vision.py --experiments untrained --seeds 0 1 2 3 4

`untrained`: Gumbel searches for a subnetwork of a small convolutional net whose weights keep their initial values,
with and without Smart Rescale and the signed constant. `resnet`: a small ResNet is trained dense and then pruned for
the same number of steps by magnitude and by PDP, to 1:4 and to half of its channels. Each run measures accuracy once,
at its end, on 600 images that are held out before any training.
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
from transformers import (
    EvalPrediction,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

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
# A convolution cannot be refitted, so PDP does not begin at its target but lets the sparsity rise.
METHODS = {"magnitude": {}, "pdp": {"soft_ramp": 0.8, "frozen_steps": 0.5}}


class ConvNet(nn.Module):
    """Conv2 of the paper: two 3x3 convolutions, a pool and three linear layers, with Kaiming-normal weights."""

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
        """Return logits of shape (images, classes) and, with labels, the loss."""
        logits = self.layers(pixel_values)
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return loss | {"logits": logits}


def digits(seed: int) -> tuple[list[dict], list[dict]]:
    """Return train and test rows, split by the seed."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    rows = [{"pixel_values": image, "labels": int(label)} for image, label in zip(pixels, labels, strict=True)]
    return train_test_split(rows, test_size=TEST_ROWS, random_state=seed, stratify=labels)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of images whose class is predicted correctly."""
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def run(model: nn.Module, seed: int, kind: type[Trainer] = Trainer, **fields) -> dict[str, float]:
    """Train on the digits (not with `max_steps=0`) and return the results of one evaluation, without any output."""
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
    """Make a small ResNet for 8x8 images."""
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1]}
    config = ResNetConfig(**sizes, layer_type="basic", num_channels=1, num_labels=CLASSES)
    # The stem of ResNet shrinks its input four times, too much for an 8x8 image: leave out the pooling in it.
    model = ResNetForImageClassification(config)
    model.resnet.embedder.pooler = nn.Identity()
    return model


def untrained_jobs(args: argparse.Namespace) -> dict[str, Callable[[int], dict[str, float]]]:
    """Map the name of each row to a function from seed to results."""

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
    """Map the name of each row to a function from seed to results; runs of one seed start from one dense model."""
    dense: dict[int, dict[str, Tensor]] = {}

    def start(seed: int) -> dict[str, float]:
        set_seed(seed)
        model = resnet()
        results = run(model, seed, max_steps=args.steps, learning_rate=3e-3)
        dense[seed] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return results

    def pruned(seed: int, fields: dict) -> dict[str, float]:
        model = resnet()
        model.load_state_dict(dense[seed])
        return run(model, seed, PruningTrainer, max_steps=args.steps, learning_rate=1e-3, **fields)

    jobs = {"ResNet, dense": start}
    for name, pattern in PATTERNS.items():
        for method, own in METHODS.items():
            fields = {"method": method, **own, **pattern}
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
    jobs_of = {"untrained": untrained_jobs, "resnet": resnet_jobs}
    jobs = {name: job for experiment in args.experiments for name, job in jobs_of[experiment](args).items()}
    rows = []
    with tqdm(total=len(jobs) * len(args.seeds), desc="digits", unit="run") as bar:
        for name, job in jobs.items():
            results = []
            for seed in args.seeds:
                results.append(job(seed))
                bar.update()
            scores = [100 * result["eval_accuracy"] for result in results]
            spread = f"{statistics.stdev(scores):.1f}" if len(scores) > 1 else "-"
            sparsity = statistics.mean(result["eval_sparsity"] for result in results)
            rows.append([name, f"{sparsity:.4f}", f"{statistics.mean(scores):.1f}", spread, len(scores)])
    table = text_table(["run", "sparsity", "test accuracy", "sd", "seeds"], rows)
    print("\n" + table)
    if args.output:
        args.output.write_text(table + "\n")


if __name__ == "__main__":
    main()
