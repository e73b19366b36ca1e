"""Settings that must hold before the Hugging Face libraries are imported, and the path to the scripts under test."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# glue_scripts is not installed: its modules import each other by plain name, as they do when run as scripts.
sys.path.insert(0, str(Path(__file__).parents[1] / "glue_scripts"))

import torch  # noqa: E402

# pytest-xdist runs one worker per core, so one thread each.
torch.set_num_threads(1)
