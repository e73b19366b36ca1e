"""How much memory does a CPU model take after it is loaded and used once, beside the float32 model?

Each model is loaded by a process of its own, on Linux. The figure is what the process holds more than before, in MB,
with the libraries that loading brings in.

    python benchmarks/cpu_memory.py FOLDER CPU_FOLDER [CPU_FOLDER ...]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import gc, sys
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification
from hf_maskselect import load_cpu

def held():
    gc.collect()
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) / 1e3 for line in file if line.startswith("Rss"))

torch.set_num_threads(1)
sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=100)
BertForSequenceClassification(BertConfig(**sizes)).eval()(torch.ones(1, 8, dtype=torch.long))  # what torch loads late
before, kind, folder = held(), *sys.argv[1:]
model = load_cpu(folder) if kind == "cpu" else AutoModelForSequenceClassification.from_pretrained(folder).eval()
size = model.config.vocab_size
with torch.inference_mode():
    model(torch.randint(0, size, (1, 128)))
    model.get_input_embeddings()(torch.arange(size))  # every row, as after some use
print(held() - before)
"""


def held(kind: str, folder: str) -> float:
    """Return the MB that a new process holds for a model."""
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, kind, folder]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Print one line a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the float32 model")
    parser.add_argument("cpu_folders", nargs="+", help="what export_cpu wrote")
    args = parser.parse_args()
    print(f"{Path(args.folder).name}: {held('dense', args.folder):.0f} MB in float32")
    for folder in args.cpu_folders:
        print(f"{Path(folder).name}: {held('cpu', folder):.0f} MB by load_cpu")


if __name__ == "__main__":
    main()
