"""How much faster do two ranks search than one, and does the cost model tell the truth?

One search of eight candidates on MiniLM, by one process that is pinned to one core and accumulates two micro-batches,
and by two gloo processes on a core each; in turns. The ideal is half the time. Beside it: what a rank sent, and the
step-equivalents, against `hf_maskselect.training.search_cost`.

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
from common import TokenRows, encoder, machine, spread
from transformers.utils import logging

from hf_maskselect import PruningConfig, PruningTrainer
from hf_maskselect.training.search_cost import Workload, search_cost
from hf_maskselect.utils.tables import text_table


def settings(args, folder: str, ranks: int) -> PruningConfig:
    """One level; every optimizer step has the same rows, whoever computes them."""
    return PruningConfig(
        output_dir=folder,
        method="random",
        num_levels=1,
        num_candidates=args.candidates,
        criterion_batches=args.criterion_batches,
        trial_steps=args.trial_steps,
        refit_rows=0,  # its tables are older
        max_steps=3 * args.trial_steps,
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=2 // ranks,
        per_device_eval_batch_size=args.batch,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )


def child(args) -> None:
    """One process of one run, which ends when the search does; rank 0 prints what it saw."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    sent, gather = [], c10d.all_gather

    def counted(tensors, tensor, *rest, **keywords):
        sent.append(tensor.numel() * tensor.element_size())
        return gather(tensors, tensor, *rest, **keywords)

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        torch.manual_seed(0)  # of the head; there is no DistributedDataParallel here to send rank 0's
        model = encoder()
        data = TokenRows(args.rows, args.length, model.config.vocab_size)
        trainer = PruningTrainer(model=model, args=settings(args, folder, ranks), train_dataset=data)
        # The whole of train() but its steps.
        trainer.create_optimizer()
        trainer.create_scheduler(trainer.args.max_steps)
        c10d.all_gather = counted
        trainer.run.search.choose(0, trainer.run.plan, 0)
        c10d.all_gather = gather
    done = trainer.run.search.history[0]
    if rank == 0:
        told = {"seconds": done.seconds, "equivalents": done.step_equivalents, "sent": sum(sent)}
        told["chosen"] = next(c.digest for c in done.candidates if c.chosen)
        told["scores"] = [c.scores for c in done.candidates]
        print(json.dumps(told))
    if dist.is_initialized():
        dist.destroy_process_group()


def run(ranks: int) -> dict:
    """`child` in processes of its own."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument(
        "--trial-steps", type=int, default=10, help="of the first rung; a level has three times as many"
    )
    parser.add_argument("--criterion-batches", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16, help="rows of a micro-batch; a step has two of them")
    parser.add_argument("--length", type=int, default=16, help="tokens in a row")
    parser.add_argument("--rows", type=int, default=640, help="of the train split, a tenth of which is held out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    print(machine(f"; MiniLM, {2 * args.batch} rows of {args.length} tokens a step"), flush=True)
    found: dict[int, list[dict]] = {1: [], 2: []}
    for round_ in range(args.rounds):
        for ranks in (1, 2) if round_ % 2 == 0 else (2, 1):
            found[ranks].append(run(ranks))
            print(f"  {ranks} rank(s): {found[ranks][-1]['seconds']:.1f} s", flush=True)
    same = all(r[key] == found[1][0][key] for rs in found.values() for r in rs for key in ("scores", "chosen"))
    rows = []
    for ranks, runs in found.items():
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
    print(text_table(["ranks", "seconds", "equivalents", "model", "bytes sent", "model"], rows))
    ratios = [a["seconds"] / (2 * b["seconds"]) for a, b in zip(found[1], found[2], strict=True)]
    print(f"of the ideal: {spread(ratios)}, aim 0.9; the same scores and choice to the bit: {'yes' if same else 'NO'}")


if __name__ == "__main__":
    main()
