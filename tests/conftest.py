"""Settings that must hold before the Hugging Face libraries are imported, and the path to the scripts under test."""

import gc
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# glue_scripts is not installed: its modules import each other by plain name, as they do when run as scripts.
sys.path.insert(0, str(Path(__file__).parents[1] / "glue_scripts"))

import pytest  # noqa: E402
import torch  # noqa: E402

# pytest-xdist runs one worker per core, so one thread each.
torch.set_num_threads(1)


def _freeze():
    """Leave everything that lives now out of later garbage collections.

    Each training begins with a full collection, which takes longer than the training if it looks through all that
    torch and transformers have made while they were imported.
    """
    gc.collect()
    gc.freeze()


def pytest_collection_finish():
    """Freeze what the imports of all test files have made."""
    _freeze()


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """Freeze what the tests of a file have imported."""
    yield
    _freeze()
