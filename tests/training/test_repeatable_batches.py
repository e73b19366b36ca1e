"""A resumed run draws the same batches where their order or content is random, to the bit."""

import random
import shutil
import warnings

import numpy as np
import pytest
import torch
from tiny import losses, make, make_trainer, same, weights_of
from transformers import BertTokenizer, DataCollatorForLanguageModeling

SAVED = {"save_strategy": "steps", "save_steps": 1, "max_steps": 12, "num_levels": 1}
DROPOUT = {"hidden_dropout_prob": 0.1}


def make_ragged(count=40):
    """Rows of different lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 12, (count,), generator=generator)
    return [{"input_ids": torch.randint(5, 64, (int(n),), generator=generator), "labels": int(n % 2)} for n in lengths]


def padded(rows):
    """Pad with zeros."""
    ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    return {
        "input_ids": ids,
        "attention_mask": ids.ne(0).long(),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def noisy(rows):
    """Draw from all three random states."""
    batch = padded(rows)
    batch["input_ids"] = (batch["input_ids"] + random.randint(0, 3) + np.random.randint(0, 3)).clamp(max=63)
    batch["input_ids"][torch.rand(batch["input_ids"].shape) < 0.3] = 4
    return batch


KINDS = {
    "group_by_length": {"collator": padded, "train_sampling_strategy": "group_by_length"},
    "noise": {"collator": noisy},
    "both": {"collator": noisy, "train_sampling_strategy": "group_by_length", "gradient_accumulation_steps": 2},
    "workers": {"collator": padded, "train_sampling_strategy": "group_by_length", "dataloader_num_workers": 1},
}


def build(folder, seed, collator, **changes):
    keywords = {"data_collator": collator}
    return make_trainer(folder, make(seed=seed, **DROPOUT), make_ragged(), keywords=keywords, **{**SAVED, **changes})


@pytest.mark.parametrize(
    "kind",
    [pytest.param(KINDS[name], id=name, marks=[pytest.mark.slow] if name != "both" else []) for name in KINDS],
)
def test_a_resumed_run_draws_the_same_batches(tmp_path, kind):
    """Five batches an epoch: a resume in the first, at the end of it, and before the last batch of the second."""
    whole = build(tmp_path / "whole", 0, **kind)
    whole.train()
    for step in (2,) if "dataloader_num_workers" in kind else (2, 5, 9):
        resumed = build(tmp_path / f"{step}", 5, **kind)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert losses(resumed) == losses(whole)
        assert same(weights_of(resumed.model), weights_of(whole.model))


def test_masks_drawn_in_workers_are_warned_of(tmp_path):
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(59))])
    )
    collator = DataCollatorForLanguageModeling(BertTokenizer(str(tmp_path / "vocab.txt")))
    for workers in (0, 1):
        trainer = make_trainer(tmp_path, keywords={"data_collator": collator}, dataloader_num_workers=workers)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            trainer.get_train_dataloader()
        assert sum("drawn in the workers of the data loader" in str(w.message) for w in told) == workers


def test_lost_states_are_missed(tmp_path):
    whole = build(tmp_path / "whole", 0, padded)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-7"
    copy = shutil.copytree(checkpoint, tmp_path / "whole" / "checkpoint-70")
    (copy / "rng_batches_0.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks rng_batches_0.safetensors"):
        build(tmp_path / "b", 5, padded).train(resume_from_checkpoint=str(copy))
