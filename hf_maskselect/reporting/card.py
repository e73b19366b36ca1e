"""The model card: task, scores, size and loading first, then how the model was pruned."""

import json
import os
import re
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from ..storage.models import model_class, of_transformers, pruned_modules
from ..storage.pack import PackReport, pack
from ..storage.packed_file import PACKED_FILE
from ..surgery.structured.layer_shapes import LayerShapes
from ..surgery.structured.record import STRUCTURED
from ..utils.files import replacing
from ..utils.tables import code, escaped, markdown_table, visible
from .plots import DENSITY, HISTORY, search_pictures
from .record import RunRecord, best_first, metrics_of
from .smaller import shape_table, smaller_summary

# Method, or the pattern without masks -> address of the paper; key, title, authors, venue and year of its BibTeX.
CITATIONS = {
    "random": (
        "https://arxiv.org/abs/2310.13183",
        "li-etal-2023-breaking",
        "Breaking through Deterministic Barriers: Randomized Pruning Mask Generation and Selection",
        "Li, Jianwei and Gao, Weizhi and Lei, Qi and Xu, Dongkuan",
        "Findings of the Association for Computational Linguistics: EMNLP 2023",
        "2023",
    ),
    "pdp": (
        "https://arxiv.org/abs/2305.11203",
        "cho2023pdp",
        "{PDP}: Parameter-free Differentiable Pruning is All You Need",
        "Cho, Minsik and Adya, Saurabh and Naik, Devang",
        "Advances in Neural Information Processing Systems",
        "2023",
    ),
    "gumbel": (
        "https://arxiv.org/abs/2202.12986",
        "dupont2022extracting",
        "Extracting Effective Subnetworks with {G}umbel-{S}oftmax",
        "Dupont, Robin and Alaoui, Mohammed Amine and Sahbi, Hichem and Lebois, Alice",
        "IEEE International Conference on Image Processing",
        "2022",
    ),
    "movement": (
        "https://arxiv.org/abs/2005.07683",
        "sanh2020movement",
        "Movement Pruning: Adaptive Sparsity by Fine-Tuning",
        "Sanh, Victor and Wolf, Thomas and Rush, Alexander M.",
        "Advances in Neural Information Processing Systems",
        "2020",
    ),
    "structured": (
        "https://arxiv.org/abs/2302.04089",
        "kurtic2023ziplm",
        "{ZipLM}: Inference-Aware Structured Pruning of Language Models",
        "Kurtic, Eldar and Frantar, Elias and Alistarh, Dan",
        "Advances in Neural Information Processing Systems",
        "2023",
    ),
}
TASKS = {  # ending of the class name -> task, as the Hub names it
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForImageClassification": "image-classification",
}
# Fields of the configuration that the card shows, where they are set.
_OPTIONS = "method pattern sparsity scope layer_floor target_modules exclude_modules keep_zeros levels"
_OPTIONS += " pruning_warmup_steps frozen_steps"
_OPTIONS_OF_STRUCTURE = "pattern target_speedup sparsity keep_shape levels num_candidates refit_rows latency_shape"
_OPTIONS_OF_STRUCTURE += " latency_dtype latency_device pruning_warmup_steps"
_OPTIONS_OF_METHOD = {
    "random": "num_candidates proposals criterion selection trial_steps selection_metric",
    "pdp": "criterion refit_rows soft_ramp pdp_tau pdp_relative_tau",
    "gumbel": "criterion refit_rows soft_ramp gumbel_prior gumbel_tau gumbel_budget gumbel_untrained gumbel_rescale"
    " gumbel_learning_rate",
    "movement": "criterion refit_rows soft_ramp movement_learning_rate movement_prior",
}
_DISTILLATION = "teacher distill_logits distill_hidden distill_attention distill_temperature hard_label_weight"
_TRAINING = "learning_rate per_device_train_batch_size gradient_accumulation_steps seed"
Scores = Mapping[str, float | Sequence[float]]


def card_text(
    record: RunRecord,
    name: str,
    pictures: Path,
    options: Mapping[str, object] | None = None,
    scores: Scores | None = None,
    dense_scores: Scores | None = None,
) -> str:
    """Return the text of the card, in Markdown, without the metadata.

    Args:
        record: the saved run.
        name: the model's name, or its repository.
        pictures: folder of the card, with its pictures if they were drawn.
        options: fields of the configuration, and `teacher`, the teacher's name, if there was one. The card shows
            those that concern pruning.
        scores: metric -> value, or one value per seed. Defaults to those of `all_results.json`, or of the last
            evaluation of the run.
        dense_scores: the same for the model before pruning. Defaults to `dense_eval_*` in `all_results.json`.
    """
    method = STRUCTURED if not record.sparse else "" if record.state is None else record.state.method
    size = _pack_report(record.folder) if record.sparse else None
    parts = [
        f"# {escaped(name)}",
        _summary(record),
        _results(record, size, scores, dense_scores),
        "## How to load it",
        _loading(record.folder, name, record.sparse),
        *(["## Shape", shape_table(record.structure)] if record.structure else []),
        *(_about_zeros(record, pictures, size) if record.sparse else []),
        *(["## How it was pruned", _options(options)] if options else []),
        _picture(pictures / HISTORY, "loss, score and sparsity over the run"),
        "## Citation",
        _citation(method),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _about_zeros(record: RunRecord, pictures: Path, size: PackReport | None) -> list[str]:
    return [
        "## Sparsity by layer",
        _picture(pictures / DENSITY, "share of the weights kept, by layer and matrix"),
        _sparsity(record),
        "## Search",
        *_search(record, pictures),
        *(["## Size", _sizes(size)] if size else []),
    ]


def task_of(class_name: str) -> str | None:
    """The task of a model class as the Hub names it, None for other heads."""
    return next((task for ending, task in TASKS.items() if class_name.endswith(ending)), None)


def _picture(path: Path, text: str) -> str:
    return f"![{text}]({quote(path.name)})" if path.is_file() else ""


def _summary(record: RunRecord) -> str:
    report, state = record.report, record.state
    model = "model"
    if of_transformers(record.folder):
        kind = model_class(record.folder)[0].__name__
        model = f"{(task_of(kind) or '').replace('-', ' ')} model (`{kind}`)".strip()
    if not record.sparse:
        return smaller_summary(record.structure, model)
    made = f" with {code(f'method={state.method!r}')}, {code(f'pattern={state.pattern!r}')}" if state else ""
    return (
        f"A sparse {model}: {report.prunable_zeros:,} of {report.prunable_total:,} prunable weights are zero "
        f"(**{report.sparsity:.4%}**), which is {report.zeros / report.total:.1%} of all {report.total:,} parameters. "
        f"Pruned by `hf_maskselect`{made}."
    )


def shown_scores(record: RunRecord, scores: Scores | None) -> Scores:
    """The given scores, else those of `all_results.json`, else those of the last evaluation."""
    last: dict = next((entry for entry in reversed(record.history) if any(k.startswith("eval_") for k in entry)), {})
    return scores or metrics_of(record.results, "eval_") or metrics_of(last, "eval_")


def _results(record: RunRecord, size: PackReport | None, scores: Scores | None, dense: Scores | None) -> str:
    scores, dense = shown_scores(record, scores), dense or metrics_of(record.results, "dense_eval_")
    rows = []
    for metric, value in scores.items():
        before = dense.get(metric)
        share = f"{mean(value) / mean(before):.1%}" if before is not None and mean(before) > 0 else "-"
        rows.append([escaped(metric), "-" if before is None else _show(before), _show(value), share])
    if record.sparse:
        rows.append(["sparsity", "0.0000", f"{record.report.sparsity:.4f}", "-"])
    if size:
        sizes = f"{size.dense / 1e6:,.2f}", f"{size.packed / 1e6:,.2f}", f"{size.packed / size.dense:.1%}"
        rows.append(["size in MB (sparse: packed)", *sizes])
    else:
        stored = sum(file.stat().st_size for file in record.folder.glob("model*.safetensors")) / 1e6
        rows.append(["size in MB", "-", f"{stored:,.2f}", "-"])
    seeds = max((_seeds(value) for value in scores.values()), default=0)
    note = f"Mean and standard deviation of {seeds} seeds." if seeds > 1 else "One seed."
    table = markdown_table(["metric", "dense", "sparse" if record.sparse else "small", "of dense"], rows)
    return f"{table}\n\n{note if seeds else 'The run has no scores.'}"


def _seeds(value: float | Sequence[float]) -> int:
    return len(value) if isinstance(value, Sequence) else 1


def mean(value: float | Sequence[float]) -> float:
    """The mean over seeds, or the value itself."""
    return statistics.fmean(value) if isinstance(value, Sequence) else value


def _show(value: float | Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(value):.4f}" if isinstance(value, Sequence) and len(value) > 1 else ""
    return f"{mean(value):.4f}{spread}"


def _loading(folder: Path, name: str, sparse: bool) -> str:
    if not of_transformers(folder):
        return (
            "Its class is not one of transformers: build it with its own code, then load `model.safetensors` into it."
        )
    cls, config = model_class(folder)
    kind = cls.__name__
    loaded = json.dumps(visible(name), ensure_ascii=False)
    first = "" if LayerShapes.of(config) is None else "import hf_maskselect  # gives each layer its own shape\n"
    plain = f"```python\n{first}from transformers import {kind}\n\nmodel = {kind}.from_pretrained({loaded})\n```\n\n"
    if not sparse:
        return f"{plain}Train it, prune it or export it like any other model."
    fields = ["sparsity=masks.sparsity()", *(f"{field}={value!r}" for field, value in pruned_modules(config).items())]
    text = (
        f"{plain}The zeros are stored in ordinary dense tensors. They do not make the model faster by themselves. To "
        "fine-tune it and keep the zeros, or to prune it further with a higher `sparsity`, load it with its masks:\n\n"
        "```python\nfrom hf_maskselect import PruningConfig, PruningTrainer, load_pruned\n\n"
        f"model, masks = load_pruned({loaded})\n"
        f"trainer = PruningTrainer(model, PruningConfig({', '.join(fields)}), train_dataset=...)\n```"
    )
    smaller = (folder / PACKED_FILE).is_file()
    return text + ("\n\n`load_pruned` downloads the packed weights, which are smaller." if smaller else "")


def _sparsity(record: RunRecord) -> str:
    rows = [
        [code(t.name), "x".join(map(str, t.shape)), f"{t.zeros:,}", f"{t.total:,}", f"{t.zeros / t.total:.4f}"]
        for t in record.report.tensors
        if t.prunable
    ]
    return _details("Every tensor", markdown_table(["tensor", "shape", "zeros", "of", "sparsity"], rows))


def _details(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def _search(record: RunRecord, folder: Path) -> list[str]:
    searches = [search for search in record.searches if len(search.candidates) > 1]
    if not searches:
        return ["No masks were tried against each other."]
    rows = []
    for search in searches:
        for candidate in best_first(search):
            scores = " → ".join(f"{score:.4f}" for score in candidate.scores)
            mark = "chosen" if candidate.chosen else ""
            rows.append([search.level + 1, f"{search.sparsity:.4f}", code(candidate.proposal), scores, mark])
    header = ["level", "sparsity", "proposal", "scores after each rung (lower is better)", ""]
    cost = sum(search.step_equivalents for search in searches)
    steps = record.state.step if record.state else 0
    ratio = f" ({cost / steps:.2f} times the {steps} steps of the training)" if steps else ""
    seconds = sum(search.seconds for search in searches)
    return [
        "At every level several candidate masks were scored on held-out rows of train, and the best was kept. "
        f"The search cost as much as {cost:,.0f} optimizer steps{ratio} and took {seconds:,.0f} s.",
        *(_picture(path, "scores of the candidates, level by level") for path in search_pictures(folder)),
        _details("Every candidate", markdown_table(header, rows)),
    ]


def _pack_report(folder: Path) -> PackReport | None:
    """The size of the weights when packed, None for a class that is not one of transformers."""
    if not of_transformers(folder):
        return None
    with tempfile.TemporaryDirectory() as packed:
        return pack(folder, packed)


def _sizes(report: PackReport) -> str:
    sizes = [
        ("dense, zeros included", report.dense),
        (f"packed without loss (`{PACKED_FILE}`)", report.packed),
        ("entropy bound of the packed file", report.bound),
    ]
    rows = [[label, f"{size / 1e6:,.2f}", f"{report.dense / size:.2f}x"] for label, size in sizes]
    return markdown_table(["weights", "MB", "smaller by"], rows)


def _options(options: Mapping[str, object]) -> str:
    smaller = options.get("pattern") == STRUCTURED
    method = (
        _OPTIONS_OF_STRUCTURE if smaller else f"{_OPTIONS} {_OPTIONS_OF_METHOD.get(str(options.get('method')), '')}"
    )
    names = " ".join([method, _DISTILLATION if options.get("teacher") else "", _TRAINING]).split()
    rows = [[code(name), code(options[name])] for name in names if options.get(name) is not None]
    return markdown_table(["option", "value"], rows) if rows else ""


def _citation(method: str) -> str:
    if method not in CITATIONS:
        return "The criterion is a classic one; the schedule and the storage are those of hf_maskselect."
    address, key, title, author, venue, year = CITATIONS[method]
    fields = {"title": title, "author": author, "booktitle": venue, "year": year}
    lines = ",\n".join(f'  {name} = "{value}"' for name, value in fields.items())
    return f"[{re.sub('[{}]', '', title)}]({address})\n\n```bibtex\n@inproceedings{{{key},\n{lines}\n}}\n```"


def write_card(folder: str | os.PathLike, metadata: str, text: str) -> None:
    """Write `README.md` into a folder: the metadata (YAML between its dashes), then the text."""
    with replacing(Path(folder) / "README.md") as card:
        card.write_text(f"{metadata.rstrip()}\n\n{text}", encoding="utf-8")
