"""Run as a script against a hub: train with `push_to_hub`, then download by name and compare.

python client.py FOLDER STRATEGY...
"""

import gc
import sys
from pathlib import Path

import torch
from tiny import make_trainer, same, weights_of
from transformers import BertForSequenceClassification

from hf_maskselect import PruningState, load_pruned, verify
from hf_maskselect.cli import main as main_of_console

torch.set_num_threads(1)
gc.freeze()  # each training begins with a garbage collection


def push_and_pull(folder, strategy):
    repository = f"someone/{strategy}"
    trainer = make_trainer(
        folder / "out",
        method="random",
        num_candidates=2,
        trial_steps=2,
        push_to_hub=True,
        hub_model_id=repository,
        hub_strategy=strategy,
        hub_always_push=True,
        save_strategy="steps",
        save_steps=4,
        eval_strategy="steps",
        eval_steps=4,
        level_eval_steps=2,
        pack_on_save=strategy == "all_checkpoints",
        keywords={"compute_metrics": lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())}},
    )
    trainer.train()
    trainer.push_to_hub(dense_scores={"accuracy": 0.9})
    plain = BertForSequenceClassification.from_pretrained(repository)
    assert same(weights_of(plain), weights_of(trainer.model))
    model, masks = load_pruned(repository, cache_dir=folder / "fresh")
    packed = list((folder / "fresh").rglob("packed_model.safetensors"))
    dense = list((folder / "fresh").rglob("model.safetensors"))
    assert (len(packed), len(dense)) == ((1, 0) if trainer.args.pack_on_save else (0, 1))
    assert load_pruned(repository)[1].digest() == masks.digest()  # where a plain load has left its files
    assert main_of_console(["verify", repository]) == 0
    assert same(weights_of(model), weights_of(trainer.model))
    assert masks.digest() == trainer.pruning_state().masks.digest()
    assert plain.config.pruning["sparsity"] == 0.75
    assert PruningState.load(trainer.args.output_dir).step == 12
    verify(trainer.args.output_dir)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        push_and_pull(Path(sys.argv[1]) / name, name)
