"""Every strategy of pushing, end to end over HTTP, and what lies in the repository then."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from server import serve

from hf_maskselect import load_pruned, verify

HERE = Path(__file__).parent
MODEL = {"config.json", "model.safetensors", "pruning_state.safetensors", "README.md", "search.json"}
PICTURES = {"pruning_density.png", "pruning_search.png", "pruning_history.png"}


STRATEGIES = ["end", "every_save", "checkpoint", "all_checkpoints"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub to which one process, with its own settings of `huggingface_hub`, has pushed by every strategy."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("hub")
    path = os.pathsep.join([str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    unset = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"}
    with serve() as (hub, address):
        own = {"PYTHONPATH": path, "HF_ENDPOINT": address, "HF_HOME": str(folder / "home"), "HF_TOKEN": "hf_token"}
        own |= {"HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = subprocess.run(
            [sys.executable, str(HERE / "client.py"), str(folder), *STRATEGIES],
            env={**{k: v for k, v in os.environ.items() if k not in unset}, **own},
            capture_output=True,
            text=True,
            timeout=600,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    assert not hub.unknown
    return hub


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_model_is_pushed_and_pulled(tmp_path, hub, strategy):
    commits = hub.repositories[f"someone/{strategy}"]
    files = commits[-1][2]
    assert files.keys() >= MODEL | PICTURES
    assert not [name for name in files if name.startswith("_") or "/_" in name and "_level_best" not in name]
    for number, (_, message, there) in enumerate(commits):
        if "in progress" in message and "checkpoint" not in message:  # each of these can be used by itself
            folder = tmp_path / f"commit-{number}"
            folder.mkdir()
            for name in MODEL & there.keys():
                (folder / name).write_bytes(there[name])
            model, masks = load_pruned(folder)
            assert masks.sparsity() >= 0.65 and PICTURES <= there.keys()
    pushes = [message for _, message, _ in commits if "in progress" in message]
    assert bool(pushes) == (strategy != "end")
    checkpoints = {name.split("/")[0] for name in files if "checkpoint" in name.split("/")[0]}
    expected = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {f"checkpoint-{n}" for n in (4, 8, 12)}}
    assert checkpoints == expected.get(strategy, set())
    for name in checkpoints:
        assert {f"{name}/{part}" for part in ("pruning_state.safetensors", "optimizer.pt")} <= files.keys()
    assert ("packed_model.safetensors" in files) == (strategy == "all_checkpoints")
    whole = tmp_path / "pulled"
    whole.mkdir()
    for name, content in files.items():
        if "/" not in name:
            (whole / name).write_bytes(content)
    verify(whole)
    card = ModelCard.load(whole / "README.md")
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["sparsity"] == 0.75 and 0 <= results["accuracy"] <= 1
    assert {"pruned", "sparse", "random"} <= set(card.data.tags)
    assert "| accuracy | 0.9000 |" in card.text and f'from_pretrained("someone/{strategy}")' in card.text
