"""One rank of a run: evaluates, trains with a search, and writes what it ended with."""

import json
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "glue_scripts")]
from tiny import losses, make, make_rows, make_trainer  # noqa: E402

from run_glue import leave_process_group  # noqa: E402

torch.set_num_threads(1)
folder, batch, changes = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
resume = changes.pop("resume", None)
keywords = {"selection_dataset": make_rows(16, seed=2), "teacher": make(seed=3)}
trainer = make_trainer(
    folder / "out",
    make(),
    **changes,
    per_device_train_batch_size=batch,
    data_seed=1,
    ddp_find_unused_parameters=False,
    keywords=keywords,
)
before = trainer.evaluate()["eval_loss"]
trainer.train(resume_from_checkpoint=resume)
trainer.save_model()
found = {
    "wrapped": type(trainer.model_wrapped).__name__,
    "before": before,
    "after": trainer.evaluate()["eval_loss"],
    "losses": losses(trainer),
    "masks": trainer.pruning_state().masks.digest(),
    "chosen": [s.metrics()["search_chosen"] for s in trainer._search.history],
    "weights": float(sum(p.detach().double().abs().sum() for p in trainer.model.parameters())),
}
(folder / f"rank{trainer.args.process_index}.json").write_text(json.dumps(found))
leave_process_group()
