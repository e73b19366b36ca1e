"""What a repository on the Hub holds besides the weights: the model card, its pictures and the pruning state."""

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard
from transformers import PreTrainedModel, Trainer

from ..config import PruningConfig
from ..reporting.card import Scores, card_text, mean, shown_scores, task_of, write_card
from ..reporting.plots import plot
from ..reporting.record import RunRecord, metrics_of
from ..search.results import SEARCH_FILE, read_searches
from ..storage.state import STATE_FILE
from ..surgery.structured.record import STRUCTURED

TAGS = ("pruned", "hf_maskselect")


def with_tags(tags: str | Sequence[str] | None, config: PruningConfig) -> list[str]:
    """The user's tags of a repository, followed by ours."""
    kinds = (STRUCTURED,) if config.pattern == STRUCTURED else ("sparse", config.method)
    own = [tags] if isinstance(tags, str) else list(tags or [])
    return [*own, *(tag for tag in (*TAGS, *kinds) if tag not in own)]


def complete_card(
    trainer: Trainer,
    folder: str | None,
    teacher: PreTrainedModel | None,
    model_name: str | None = None,
    scores: Scores | None = None,
    dense_scores: Scores | None = None,
) -> None:
    """Replace the text of the card that `Trainer` wrote into `output_dir`, and keep its metadata.

    Args:
        trainer: the trainer; its `args` are a [`PruningConfig`].
        folder: the folder of the saved model that the card describes: `output_dir` or a checkpoint.
        teacher: named in the card.
        model_name: name of the repository, where `hub_model_id` is not set.
        scores: metric -> value, or a list with one value per seed. Default: the last evaluation of this run.
        dense_scores: the same of the model before pruning.
    """
    config, history, output = trainer.args, trainer.state.log_history, Path(trainer.args.output_dir or "")
    assert isinstance(config, PruningConfig)
    source = Path(folder or "")
    if not trainer.is_world_process_zero() or not (source / STATE_FILE).is_file():  # no pruned model is saved
        return
    model_class = type(trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)).__name__
    name = trainer.hub_model_id or model_name or output.name
    searches = read_searches(output / SEARCH_FILE) if (output / SEARCH_FILE).is_file() else []
    record = dataclasses.replace(RunRecord.load(source), searches=searches, history=history)
    if importlib.util.find_spec("matplotlib"):
        plot(record, output)
    last = next((entry for entry in reversed(history) if metrics_of(entry, "eval_")), {})
    scores = scores or metrics_of(last, "eval_")  # not those of an earlier run in the same folder
    task = task_of(model_class)
    metadata = ModelCard.load(output / "README.md").data
    metadata.model_name = name.split("/")[-1]
    metadata.eval_results = metadata.eval_results or _eval_results(record, scores, task)
    metadata.pipeline_tag = metadata.pipeline_tag or task
    text = card_text(record, name, output, _options(config, teacher), scores, dense_scores)
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
        for name, value in {**shown, **({"sparsity": record.report.sparsity} if record.sparse else {})}.items()
    ]


def _options(config: PruningConfig, teacher: PreTrainedModel | None) -> dict[str, object]:
    """The arguments of a run as its card may show them, with their defaults filled in."""
    options = {**config.to_dict(), **config.resolved().record()}
    if teacher is not None:  # a name on the Hub is public; of a folder only its own name is
        path = teacher.name_or_path or type(teacher).__name__
        options["teacher"] = Path(path).name if Path(path).is_dir() else path
    return options
