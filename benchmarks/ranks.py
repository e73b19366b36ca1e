"""How much faster do two processes search than one, and is the cost model right?

The script runs one search of eight candidates on MiniLM in turns: in one process that is pinned to one core and
accumulates two micro-batches, and in two gloo processes with a core each. The ideal is half the time. It also compares
the bytes that a process sent, and the step equivalents, with `hf_maskselect.training.search_cost`.

    python benchmarks/ranks.py
    python benchmarks/ranks.py --criterion-batches 256 --trial-steps 40 --length 32    # longer trials
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from common import QUIET, TokenRows, encoder, machine, spread
from transformers.utils import logging

from hf_maskselect import PruningConfig, PruningTrainer
from hf_maskselect.training.search_cost import Workload, search_cost
from hf_maskselect.utils.tables import text_table


def settings(args, folder: str, ranks: int) -> PruningConfig:
    """Arguments of one level; every optimizer step has the same rows, in one process or in two."""
    return PruningConfig(
        output_dir=folder,
        method="random",
        num_levels=1,
        num_candidates=args.candidates,
        criterion_batches=args.criterion_batches,
        trial_steps=args.trial_steps,
        refit_rows=0,  # as in the tables of RESULTS.md, which are older than the refit
        max_steps=3 * args.trial_steps,
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=2 // ranks,
        per_device_eval_batch_size=args.batch,
        use_cpu=True,
        **QUIET,
    )


def child(args) -> None:
    """Run one search in this process; rank 0 prints the result as JSON."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    sent, gather = [], c10d.all_gather

    def counted(tensors, tensor, *rest, **keywords):
        sent.append(tensor.numel() * tensor.element_size())
        return gather(tensors, tensor, *rest, **keywords)

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        torch.manual_seed(0)  # for the head: without DistributedDataParallel nobody sends rank 0's weights
        model = encoder()
        data = TokenRows(args.rows, args.length, model.config.vocab_size)
        trainer = PruningTrainer(model=model, args=settings(args, folder, ranks), train_dataset=data)
        # Everything that train() does before its first step.
        trainer.create_optimizer()
        trainer.create_scheduler(trainer.args.max_steps)
        c10d.all_gather = counted
        trainer.run.search.choose(0, trainer.run.plan, 0)
        c10d.all_gather = gather
    done = trainer.run.search.history[0]
    if rank == 0:
        result = {"seconds": done.seconds, "equivalents": done.step_equivalents, "sent": sum(sent)}
        result["chosen"] = next(c.digest for c in done.candidates if c.chosen)
        result["scores"] = [c.scores for c in done.candidates]
        print(json.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()


def run(ranks: int) -> dict:
    """Run `child` in new processes and return the result of rank 0."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*launcher, __file__, "--child", *sys.argv[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Time both in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument(
        "--trial-steps", type=int, default=10, help="steps of the first rung; a level has three times as many"
    )
    parser.add_argument("--criterion-batches", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16, help="rows of a micro-batch; a step has two micro-batches")
    parser.add_argument("--length", type=int, default=16, help="tokens in a row")
    parser.add_argument("--rows", type=int, default=640, help="train rows; a tenth of them is held out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    print(machine(f"; MiniLM, {2 * args.batch} rows of {args.length} tokens a step"), flush=True)
    runs_of: dict[int, list[dict]] = {1: [], 2: []}
    for round_ in range(args.rounds):
        for ranks in (1, 2) if round_ % 2 == 0 else (2, 1):
            runs_of[ranks].append(run(ranks))
            print(f"  {ranks} process(es): {runs_of[ranks][-1]['seconds']:.1f} s", flush=True)
    same = all(r[key] == runs_of[1][0][key] for rs in runs_of.values() for r in rs for key in ("scores", "chosen"))
    rows = []
    for ranks, runs in runs_of.items():
        with tempfile.TemporaryDirectory() as folder:
            model = search_cost(Workload(settings(args, folder, ranks), 1, 1, args.rows), ranks)
        rows.append(
            [
                ranks,
                spread([r["seconds"] for r in runs], 1),
                f"{runs[0]['equivalents']:.1f}",
                f"{model.compute:.1f}",
                runs[0]["sent"],
                model.sent,
            ]
        )
    print(text_table(["processes", "seconds", "equivalents", "model", "bytes sent", "model"], rows))
    ratios = [a["seconds"] / (2 * b["seconds"]) for a, b in zip(runs_of[1], runs_of[2], strict=True)]
    print(f"of the ideal: {spread(ratios)}, aim 0.9; the same scores and choice to the bit: {'yes' if same else 'NO'}")


if __name__ == "__main__":
    main()
