"""What goes to the Hub besides the weights: the state, the card and its pictures."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard
from transformers.trainer_utils import HubStrategy

from ..reporting.card import Scores, card_text, mean, shown_scores, task_of, write_card
from ..reporting.plots import plot
from ..reporting.record import RunRecord, metrics_of
from ..search.results import SEARCH_FILE, read_searches
from ..storage.packed_file import PACKED_FILE
from ..storage.state import STATE_FILE, PruningState
from .atomic_checkpoints import WholeCheckpoints

TAGS = ("pruned", "sparse", "hf_maskselect")


class HubTrainer(WholeCheckpoints):
    """A `Trainer` whose repositories on the Hub tell what was pruned, and can be loaded plainly or gone on with."""

    def create_model_card(
        self,
        *args,
        model_name: str | None = None,
        tags: str | list[str] | None = None,
        scores: Scores | None = None,
        dense_scores: Scores | None = None,
        **kwargs,
    ) -> None:
        """`README.md` of the saved model in `output_dir`: the metadata as [`Trainer`] makes it, and our text.

        Args:
            scores: metric -> value, or a list with one value a seed; by default the last evaluation.
            dense_scores: the same of the model before pruning.
        """
        self._write_card(Path(self.args.output_dir), model_name, tags, scores, dense_scores, *args, **kwargs)

    def _write_card(self, source: Path, model_name, tags, scores=None, dense_scores=None, *args, **kwargs) -> None:
        """The card of the model saved in `source`, into `output_dir`."""
        given = [tags] if isinstance(tags, str) else list(tags or [])
        tags = [*given, *(tag for tag in (*TAGS, self.args.method) if tag not in given)]
        super().create_model_card(*args, model_name=model_name, tags=tags, **kwargs)
        if not self.is_world_process_zero() or not (source / STATE_FILE).is_file():
            return
        output = Path(self.args.output_dir)
        searches = read_searches(output / SEARCH_FILE) if (output / SEARCH_FILE).is_file() else []
        record = dataclasses.replace(RunRecord.load(source), searches=searches, history=self.state.log_history)
        if importlib.util.find_spec("matplotlib"):
            plot(record, output)
        last = next((e for e in reversed(self.state.log_history) if metrics_of(e, "eval_")), {})
        scores = scores or metrics_of(last, "eval_")  # of this run, whatever an earlier one left in the folder
        name = self.hub_model_id or model_name or output.name
        metadata = ModelCard.load(output / "README.md").data
        metadata.model_name = name.split("/")[-1]
        metadata.eval_results = metadata.eval_results or self._eval_results(record, scores)
        metadata.pipeline_tag = metadata.pipeline_tag or self._task()
        text = card_text(record, name, output, self._card_options(), scores, dense_scores)
        write_card(output, f"---\n{metadata.to_yaml()}\n---", text)

    def _card_options(self) -> dict[str, object]:
        """What the card may tell of how the model was made."""
        return self.args.to_dict()

    def _eval_results(self, record: RunRecord, scores: Scores | None) -> list[EvalResult]:
        """The card's `model-index`, where transformers knows no name of the dataset: the scores shown, and the
        sparsity."""
        shown = {name: mean(value) for name, value in shown_scores(record, scores).items()}
        task = self._task() or "other"
        return [
            EvalResult(
                task_type=task,
                dataset_type="evaluation",
                dataset_name="the evaluation set of the run",
                metric_type=name,
                metric_value=round(value, 6),
            )
            for name, value in {**shown, "sparsity": record.report.sparsity}.items()
        ]

    def _task(self) -> str | None:
        return task_of(type(self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)).__name__)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._checkpointing and self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
            if busy and not self.args.hub_always_push:
                return
            # An upload in flight still reads `output_dir`, and would mix this model with the last.
            self._finish_current_push()
            PruningState.load(checkpoint_folder).save(self.args.output_dir)  # without what resuming needs
            (Path(self.args.output_dir) / PACKED_FILE).unlink(missing_ok=True)  # of another model
            self._write_card(Path(checkpoint_folder), None, None)
        super()._push_from_checkpoint(checkpoint_folder)
