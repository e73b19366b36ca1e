"""Train once to the end, then again and again with a kill -9 at a chosen event, and resume.

Every run is a fork of this process, which itself never computes a gradient. Events are counted, not timed, so that a
kill falls at the same place on any machine: each optimizer step of the run ("train"), each of a trial and each of its
scores ("trial"), and each operation on files ("save"), half of these with the file cut in two, as a write that was
interrupted leaves it. (Two threads write a checkpoint, so that a kill among its files may fall at a neighbour.)
"""

import json
import os
import random
import signal
import sys
import threading
from collections import Counter
from pathlib import Path

import safetensors.torch
import torch
import transformers.modeling_utils
from tiny import losses, make, make_trainer, weights_of
from transformers.trainer_utils import get_last_checkpoint

import hf_maskselect.masking.maskset
import hf_maskselect.search.weight_files
import hf_maskselect.storage.packed_file
from hf_maskselect.search.bench import TrialBench
from hf_maskselect.storage.runs import last_checkpoint

SETTINGS = {
    "random": {
        "method": "random",
        "num_candidates": 3,
        "proposals": ["magnitude:layer", "magnitude:global", "magnitude:layer:votes"],
        "trial_steps": 2,
        "level_eval_steps": 2,
    },
    "fitted": {"method": "random", "num_candidates": 4, "refit_rows": 32},
    "survivors": {
        "method": "random",
        "selection": "survivors",
        "num_candidates": 4,
        "proposals": ["magnitude:layer", "magnitude:global", "magnitude:layer:votes"],
        "trial_steps": 2,
    },
    "pdp": {"method": "pdp", "num_levels": None, "frozen_steps": 4, "pdp_tau": 1e-3, "num_candidates": 2},
    "gumbel": {"method": "gumbel", "num_levels": None, "frozen_steps": 4, "num_candidates": 2},
}
SAVING = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 2, "pack_on_save": True}


class Events:
    """Counts what happens, and kills the process at the event of a given kind and number."""

    def __init__(self, kind=None, number=None):
        self.kind, self.number, self.counts, self.in_trial = kind, number, Counter(), False
        self.finished = [0]  # steps of all trials, at the end of each
        self.lock = threading.Lock()

    def happen(self, kind, cut=None):
        with self.lock:
            self.counts[kind] += 1
            if (kind, self.counts[kind]) == (self.kind, self.number):
                if cut is not None and self.number % 2:
                    os.truncate(cut, os.path.getsize(cut) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

    def watch(self):
        """Put the counters in."""
        step, trial, score = torch.optim.AdamW.step, TrialBench.trial, TrialBench.score

        def watched_step(optimizer, *args, **kwargs):
            self.happen("trial" if self.in_trial else "train")
            return step(optimizer, *args, **kwargs)

        def watched_trial(*args, **kwargs):
            self.in_trial = True
            try:
                return trial(*args, **kwargs)
            finally:
                self.in_trial = False
                self.finished.append(self.counts["trial"])

        def watched_score(bench):
            if self.in_trial:
                self.happen("trial")
            return score(bench)

        torch.optim.AdamW.step, TrialBench.trial, TrialBench.score = watched_step, watched_trial, watched_score
        for module, name, path_at in (
            (os, "replace", 0),
            (os, "rename", 0),
            (torch, "save", 1),
            (transformers.modeling_utils, "safe_save_file", 1),
            (hf_maskselect.masking.maskset, "save_file", 1),
            (hf_maskselect.search.weight_files, "save_file", 1),
        ):
            setattr(module, name, self.watched(getattr(module, name), path_at))

    def watched(self, operation, path_at):
        def run(*args, **kwargs):
            if path_at == 0:  # a rename: killed before it
                self.happen("save")
                return operation(*args, **kwargs)
            found = operation(*args, **kwargs)
            target = args[path_at]
            self.happen("save", target if isinstance(target, str | os.PathLike) else None)
            return found

        return run


def train(folder, method, events):
    """One run in this process, from the last whole checkpoint if there is one."""
    events.watch()
    trainer = make_trainer(folder, make(), **SETTINGS[method], **SAVING)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    trainer.save_model()
    searches = json.loads((Path(folder) / "search.json").read_text())
    for search in searches:
        del search["seconds"]
    found = {
        "losses": losses(trainer),
        "masks": trainer.pruning_state().masks.digest(),
        "searches": searches,
        "counts": events.counts,
        "finished": events.finished,
        "left": sorted(p.name for p in Path(folder).iterdir() if p.name.startswith("_")),
    }
    safetensors.torch.save_file(weights_of(trainer.model), Path(folder) / "weights.safetensors")
    (Path(folder) / "found.json").write_text(json.dumps(found))


def fork(folder, method, events):
    """`train` in a fork; returns the signal that ended it (0: it ended by itself)."""
    pid = os.fork()
    if pid == 0:
        code = 1
        torch.set_num_threads(1)  # torch's threads are gone after a fork: make them again, once
        try:
            log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            train(folder, method, events)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit(f"the run in {folder} failed:\n" + Path(f"{folder}.log").read_text()[-3000:])
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def result(folder):
    """What a finished run left, to be compared; without the counts of events."""
    found = json.loads((folder / "found.json").read_text())
    del found["counts"], found["finished"]
    return found, (folder / "weights.safetensors").read_bytes()


def kill_anywhere(root, method, count, seed):
    """Kill `count` runs of a method; return how many at which kind of event, and the events of a whole run."""
    whole = root / "whole"
    fork(whole, method, Events())
    expected = result(whole)
    told = json.loads((whole / "found.json").read_text())
    counts, finished = told["counts"], told["finished"]
    draw = random.Random(seed)
    kinds = [kind for kind in ("train", "trial", "save") if counts.get(kind)]
    killed = Counter()
    for index in range(count):
        kind = kinds[index % len(kinds)]
        number = draw.randint(1, counts[kind])
        folder = root / f"{index}-{kind}-{number}"
        if fork(folder, method, Events(kind, number)) != signal.SIGKILL:
            sys.exit(f"{folder}: the run was to be killed at {kind} {number} of {counts[kind]} and was not")
        killed[kind] += 1
        if get_last_checkpoint(folder) != last_checkpoint(folder):
            sys.exit(f"{folder}: {get_last_checkpoint(folder)} was left half-written")
        fork(folder, method, Events())
        if kind == "trial":
            before = max(steps for steps in finished if steps < number)
            repeated = json.loads((folder / "found.json").read_text())["counts"]["trial"] - (counts["trial"] - before)
            if repeated:
                sys.exit(f"{folder}: {repeated} trial steps were repeated")
        found = result(folder)
        for name, value in expected[0].items():
            if found[0][name] != value:
                sys.exit(f"{folder}: after a resume {name} is {found[0][name]} and not {value}")
        if found[1] != expected[1]:
            sys.exit(f"{folder}: after a resume the weights differ")
    return {"killed": killed, "counts": counts}
