"""What a repository on the Hub holds besides the weights: the model card, its pictures and the pruning state."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard
from transformers import PreTrainedModel

from ..config import PruningConfig
from ..reporting.card import Scores, card_text, mean, shown_scores, write_card
from ..reporting.plots import plot
from ..reporting.record import RunRecord, metrics_of
from ..search.results import SEARCH_FILE, read_searches
from ..storage.packed_file import PACKED_FILE
from ..storage.state import STATE_FILE, PruningState

_TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForImageClassification": "image-classification",
}
TAGS = ("pruned", "sparse", "hf_maskselect")


def with_tags(tags: str | Sequence[str] | None, method: str) -> list[str]:
    """The user's tags of a repository, followed by ours."""
    own = [tags] if isinstance(tags, str) else list(tags or [])
    return [*own, *(tag for tag in (*TAGS, method) if tag not in own)]


def complete_card(
    output: Path,
    source: Path,
    *,
    model_name: str,
    model_class: str,
    history: list[dict],
    options: Mapping[str, object],
    scores: Scores | None = None,
    dense_scores: Scores | None = None,
) -> None:
    """Replace the text of the card that `Trainer` wrote into `output`, and keep its metadata.

    Args:
        output: the folder that is pushed; pictures go there too, where matplotlib is installed.
        source: the folder of the saved model that the card describes: `output` itself or a checkpoint.
        model_name: the name of the repository.
        model_class: the name of the model's class, which decides the task.
        history: the trainer's log.
        options: the arguments of the run, of which the card shows some.
        scores: metric -> value, or a list with one value a seed. Default: the last evaluation in `history`.
        dense_scores: the same of the model before pruning.
    """
    if not (source / STATE_FILE).is_file():  # nothing is pruned yet
        return
    searches = read_searches(output / SEARCH_FILE) if (output / SEARCH_FILE).is_file() else []
    record = dataclasses.replace(RunRecord.load(source), searches=searches, history=history)
    if importlib.util.find_spec("matplotlib"):
        plot(record, output)
    last = next((entry for entry in reversed(history) if metrics_of(entry, "eval_")), {})
    scores = scores or metrics_of(last, "eval_")  # not those of an earlier run in the same folder
    task = next((task for ending, task in _TASKS.items() if model_class.endswith(ending)), None)
    metadata = ModelCard.load(output / "README.md").data
    metadata.model_name = model_name.split("/")[-1]
    metadata.eval_results = metadata.eval_results or _eval_results(record, scores, task)
    metadata.pipeline_tag = metadata.pipeline_tag or task
    text = card_text(record, model_name, output, options, scores, dense_scores)
    write_card(output, f"---\n{metadata.to_yaml()}\n---", text)


def _eval_results(record: RunRecord, scores: Scores | None, task: str | None) -> list[EvalResult]:
    """The `model-index` of a card where transformers knows no name of the dataset: the scores and the sparsity."""
    shown = {name: mean(value) for name, value in shown_scores(record, scores).items()}
    return [
        EvalResult(
            task_type=task or "other",
            dataset_type="evaluation",
            dataset_name="the evaluation set of the run",
            metric_type=name,
            metric_value=round(value, 6),
        )
        for name, value in {**shown, "sparsity": record.report.sparsity}.items()
    ]


def prepare_push(checkpoint: str, output: str) -> None:
    """Make the output folder, which is pushed, describe the model of a checkpoint."""
    PruningState.load(checkpoint).save(output)  # without what only a resumed run needs
    (Path(output) / PACKED_FILE).unlink(missing_ok=True)  # it holds another model


def card_options(config: PruningConfig, teacher: PreTrainedModel | None) -> dict[str, object]:
    """The arguments of a run as its card may show them, with their defaults filled in."""
    options = {**config.to_dict(), **config.resolved().record()}
    if teacher is not None:  # a name on the Hub is public; of a folder only its own name is
        path = teacher.name_or_path
        options["teacher"] = Path(path).name if Path(path).is_dir() else path or type(teacher).__name__
    return options
