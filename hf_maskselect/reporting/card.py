"""The model card: what was pruned and how, what came out, what it cost, how to go on."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..storage.models import model_class, of_transformers, pruned_modules
from ..storage.pack import pack
from ..storage.packed_file import PACKED_FILE
from ..utils.tables import markdown_table
from .plots import DENSITY, HISTORY, SEARCH
from .record import RunRecord, metrics_of

CITATIONS = {
    "random": (
        "Randomized Pruning Mask Generation and Selection",
        "https://arxiv.org/abs/2310.13183",
        """@inproceedings{li-etal-2023-breaking,
  title = "Breaking through Deterministic Barriers: Randomized Pruning Mask Generation and Selection",
  author = "Li, Jianwei and Gao, Weizhi and Lei, Qi and Xu, Dongkuan",
  booktitle = "Findings of the Association for Computational Linguistics: EMNLP 2023",
  year = "2023"
}""",
    ),
    "pdp": (
        "PDP: Parameter-free Differentiable Pruning is All You Need",
        "https://arxiv.org/abs/2305.11203",
        """@inproceedings{cho2023pdp,
  title = "{PDP}: Parameter-free Differentiable Pruning is All You Need",
  author = "Cho, Minsik and Adya, Saurabh and Naik, Devang",
  booktitle = "Advances in Neural Information Processing Systems",
  year = "2023"
}""",
    ),
    "gumbel": (
        "Extracting Effective Subnetworks with Gumbel-Softmax",
        "https://arxiv.org/abs/2202.12986",
        """@inproceedings{dupont2022extracting,
  title = "Extracting Effective Subnetworks with {G}umbel-{S}oftmax",
  author = "Dupont, Robin and Alaoui, Mohammed Amine and Sahbi, Hichem and Lebois, Alice",
  booktitle = "IEEE International Conference on Image Processing",
  year = "2022"
}""",
    ),
}
_OPTIONS = (
    "method",
    "pattern",
    "sparsity",
    "scope",
    "layer_floor",
    "target_modules",
    "exclude_modules",
    "keep_zeros",
    "levels",
    "pruning_warmup_steps",
    "frozen_steps",
)
_OF_METHOD = {
    "random": ("num_candidates", "proposals", "criterion", "selection", "trial_steps", "selection_metric"),
    "pdp": ("soft_ramp", "pdp_tau"),
    "gumbel": (
        "soft_ramp",
        "gumbel_tau",
        "gumbel_budget",
        "gumbel_untrained",
        "gumbel_rescale",
        "gumbel_learning_rate",
    ),
}
_DISTILLATION = (
    "teacher",
    "distill_logits",
    "distill_hidden",
    "distill_attention",
    "distill_temperature",
    "hard_label_weight",
)
_TRAINING = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "seed")
Scores = Mapping[str, float | Sequence[float]]


def card_text(
    record: RunRecord,
    name: str,
    pictures: Path,
    options: Mapping[str, object] | None = None,
    scores: Scores | None = None,
    dense_scores: Scores | None = None,
) -> str:
    """The card's text, without metadata.

    Args:
        record: the saved run.
        name: the model's name, or its repository.
        pictures: folder of the card, where its pictures lie if they were drawn.
        options: fields of the config, and `teacher`, its name, if there was one; those that say something of pruning
            are shown.
        scores: metric -> value, or the values of several seeds; by default those of `all_results.json`, or of the
            last evaluation of the run.
        dense_scores: the same of the model before pruning; by default `dense_eval_*` there.
    """
    report, state = record.report, record.state
    method = "?" if state is None else state.method
    parts = [
        f"# {name}",
        f"A sparse model: {report.prunable_zeros:,} of {report.prunable_total:,} prunable weights are zero "
        f"(**{report.sparsity:.4%}**; {report.zeros / report.total:.1%} of all {report.total:,} parameters), "
        f"made by `hf_maskselect` with `method={method!r}`"
        + (f", `pattern={state.pattern!r}`" if state else "")
        + ". The zeros are ordinary zeros in ordinary tensors: it loads like any model of its class, and dense "
        "kernels do not run it faster.",
        "## Scores",
        _scores(record, scores, dense_scores),
        "## How to load it",
        _loading(record.folder, name),
        "## Sparsity by layer",
        _picture(pictures, DENSITY, "share of the weights kept, by layer and matrix"),
        _sparsity(record),
        "## Search",
        _search(record, pictures),
        "## Size",
        _sizes(record),
        "## How it was pruned",
        _options(options or {}),
        _picture(pictures, HISTORY, "loss, score and cuts over the run"),
        "## Citation",
        _citation(method),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _picture(folder: Path, name: str, text: str) -> str:
    return f"![{text}]({name})" if (folder / name).is_file() else ""


def shown_scores(record: RunRecord, scores: Scores | None) -> Scores:
    """The given scores, else those of `all_results.json`, else those of the last evaluation."""
    last = next((entry for entry in reversed(record.history) if any(k.startswith("eval_") for k in entry)), {})
    return scores or metrics_of(record.results, "eval_") or metrics_of(last, "eval_")


def _scores(record: RunRecord, scores: Scores | None, dense: Scores | None) -> str:
    scores, dense = shown_scores(record, scores), dense or metrics_of(record.results, "dense_eval_")
    if not scores:
        return "None were given with the run."
    rows = []
    for metric, value in scores.items():
        before, after = dense.get(metric), mean(value)
        kept = f"{after / mean(before):.1%}" if before is not None and mean(before) > 0 else "-"
        rows.append([metric, "-" if before is None else _show(before), _show(value), kept])
    table = markdown_table(["metric", "dense", "sparse", "of dense"], rows)
    many = max(_seeds(value) for value in scores.values())
    return table + f"\n\n{'One seed.' if many == 1 else f'Mean and standard deviation of {many} seeds.'}"


def _seeds(value: float | Sequence[float]) -> int:
    return len(value) if isinstance(value, Sequence) else 1


def mean(value: float | Sequence[float]) -> float:
    """Of one value a seed, or the value itself."""
    return statistics.fmean(value) if isinstance(value, Sequence) else value


def _show(value: float | Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(value):.4f}" if _seeds(value) > 1 else ""
    return f"{mean(value):.4f}{spread}"


def _loading(folder: Path, name: str) -> str:
    if not of_transformers(folder):
        return (
            "Its class is not one of transformers: build it with its own code, then load `model.safetensors` into it."
        )
    cls, config = model_class(folder)
    kind = cls.__name__
    fields = ["sparsity=masks.sparsity()", *(f"{field}={value!r}" for field, value in pruned_modules(config).items())]
    text = (
        f'```python\nfrom transformers import {kind}\n\nmodel = {kind}.from_pretrained("{name}")\n```\n\n'
        "With its masks, to be fine-tuned on with its zeros kept, or (at a higher `sparsity`) pruned further:\n\n"
        "```python\nfrom hf_maskselect import PruningConfig, PruningTrainer, load_pruned\n\n"
        f'model, masks = load_pruned("{name}")\n'
        f"trainer = PruningTrainer(model, PruningConfig({', '.join(fields)}), train_dataset=...)\n```"
    )
    smaller = (folder / PACKED_FILE).is_file()
    return text + ("\n\n`load_pruned` downloads the packed weights, which are smaller." if smaller else "")


def _sparsity(record: RunRecord) -> str:
    rows = [
        [f"`{t.name}`", "x".join(map(str, t.shape)), f"{t.zeros:,}", f"{t.total:,}", f"{t.zeros / t.total:.4f}"]
        for t in record.report.tensors
        if t.prunable
    ]
    table = markdown_table(["tensor", "shape", "zeros", "of", "sparsity"], rows)
    return f"<details><summary>Every tensor</summary>\n\n{table}\n\n</details>"


def _search(record: RunRecord, pictures: Path) -> str:
    searches = [search for search in record.searches if len(search.candidates) > 1]
    if not searches:
        return "No masks were tried against each other."
    parts = [_picture(pictures, SEARCH, "scores of the candidates, level by level")]
    rows = []
    for search in searches:
        for candidate in sorted(search.candidates, key=lambda c: (-len(c.scores), c.rank)):
            scores = " → ".join(f"{score:.4f}" for score in candidate.scores)
            mark = "chosen" if candidate.chosen else ""
            rows.append([search.level + 1, f"{search.sparsity:.4f}", f"`{candidate.proposal}`", scores, mark])
    header = ["level", "sparsity", "proposal", "scores after each rung (lower is better)", ""]
    cost = sum(search.step_equivalents for search in searches)
    seconds = sum(search.seconds for search in searches)
    steps = record.state.step if record.state else 0
    ratio = f", {cost / steps:.2f} times its {steps} training steps" if steps else ""
    parts += [
        markdown_table(header, rows),
        f"Cost: {cost:,.0f} optimizer-step equivalents{ratio}, {seconds:,.0f} s. Scores are on rows held out of "
        "train.",
    ]
    return "\n\n".join(part for part in parts if part)


def _sizes(record: RunRecord) -> str:
    if not of_transformers(record.folder):
        return f"{sum(file.stat().st_size for file in record.folder.glob('model*.safetensors')) / 1e6:,.2f} MB."
    with tempfile.TemporaryDirectory() as folder:
        report = pack(record.folder, folder)
    sizes = [
        ("dense, zeros and all", report.dense),
        (f"packed without loss (`{PACKED_FILE}`)", report.packed),
        ("entropy bound of that", report.bound),
    ]
    rows = [[what, f"{size / 1e6:,.2f}", f"{report.dense / size:.2f}x"] for what, size in sizes]
    return markdown_table(["weights", "MB", "smaller by"], rows)


def _options(options: Mapping[str, object]) -> str:
    distilled = _DISTILLATION if options.get("teacher") else ()
    names = [*_OPTIONS, *_OF_METHOD.get(options.get("method"), ()), *distilled, *_TRAINING]
    rows = [[f"`{name}`", f"`{options[name]}`"] for name in names if options.get(name) is not None]
    return markdown_table(["option", "value"], rows) if rows else ""


def _citation(method: str) -> str:
    if method not in CITATIONS:
        return "The criterion is a classic one; the schedule and the storage are those of hf_maskselect."
    title, url, bibtex = CITATIONS[method]
    return f"[{title}]({url})\n\n```bibtex\n{bibtex}\n```"


def write_card(folder: str | os.PathLike, metadata: str, text: str) -> None:
    """`README.md` of a folder: metadata (YAML, with its dashes) and text."""
    (Path(folder) / "README.md").write_text(f"{metadata.rstrip()}\n\n{text}", encoding="utf-8")
