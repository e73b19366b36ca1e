r"""Does the exponent of the votes matter? Score masks with several exponents around one criterion, after refit.

    python benchmarks/exponents.py --task sst2 --sparsity 0.9375 --dense runs/sst2/42/dense --output_dir exponents \
        --data_dir DATA [flags of run_glue.py]

A vote draws entry i with p_i ~ score_i^exponent. An exponent of 0 ignores the score; a large exponent gives the
deterministic mask. Each mask is scored after refit, without training, on the held-out rows (mean over two halves).
`trials.py` measures how well this score predicts the result of training.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from tqdm.auto import tqdm
from transformers import set_seed
from trials import bench_of, cut, level_flags

from arguments import parse_arguments
from hf_maskselect.masking.proposals import Proposal
from hf_maskselect.masking.scores import CRITERIA
from hf_maskselect.utils.tables import markdown_table
from job import prepare

CENTRES = [Proposal("taylor", "balanced"), Proposal("magnitude", "layer")]
EXPONENTS = (1.0, 2.5, 5.0, 10.0)
DRAWS = 2
RATIO = 1e-4


def main() -> None:
    """Draw, refit and score every mask, then print the table."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=formatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--sparsity", type=float, required=True)
    parser.add_argument("--dense", required=True, help="folder of the dense model: start and teacher")
    options, flags = parser.parse_known_args()
    options.steps = 1
    data, model, config = parse_arguments(
        [*level_flags(flags, options), "--output_dir", str(options.output_dir / "run")]
    )
    set_seed(config.seed)
    trainer, bench = bench_of(prepare(data, model, config), model, config, options.dense)
    stats = bench.gradient_stats({"product"}, 0)
    before_cut = {name: weight.detach().clone() for name, weight in trainer.run.method.weights.items()}
    draws = [(centre, power) for centre in CENTRES for power in (None, *(p for p in EXPONENTS for _ in range(DRAWS)))]
    cuts, centres, rows = [], {}, []
    for index, (centre, power) in enumerate(draws):
        proposal, criterion = centre, CRITERIA[centre.criterion]
        if power is not None:
            proposal = dataclasses.replace(centre, ratio=RATIO)
            criterion = dataclasses.replace(criterion, vote_exponent=power)
        cuts.append(cut(trainer, proposal, index, stats, {**CRITERIA, centre.criterion: criterion}))
    with bench.sandbox.untouched(), bench.shared_dense():
        for (centre, power), masks in zip(tqdm(draws, unit="mask"), cuts, strict=True):
            centres.setdefault(centre, masks)
            bench.sandbox.restore()
            trainer.run.method.set_masks(masks)
            bench.refit(before_cut, 0)
            halves = [bench.measure(part) for part in (0, 1)]
            rows.append(
                {
                    "centre": str(centre),
                    "exponent": power,
                    "overlap": masks.overlap(centres[centre]),
                    "teacher": sum(half["teacher"] for half in halves) / 2,
                    "metric": -sum(half["metric"] for half in halves) / 2,
                }
            )
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / f"{options.task}-{options.sparsity:g}.json").write_text(json.dumps(rows, indent=1))
    table = []
    for row in rows:
        power = "no votes" if row["exponent"] is None else f"{row['exponent']:g}"
        scores = [f"{row['overlap']:.3f}", f"{row['teacher']:.4f}", f"{row['metric']:.4f}"]
        table.append([row["centre"], power, *scores])
    print(markdown_table(["around", "exponent", "kept set shared", "disagreement with the teacher", "metric"], table))


if __name__ == "__main__":
    main()
