"""A short run of the vision script: its rows, and a subnetwork of untrained weights above chance."""

import sys

import pytest

import run_vision


@pytest.mark.slow
@pytest.mark.exhaustive
def test_an_untrained_net_holds_a_subnetwork_far_above_chance(monkeypatch, capsys, tmp_path):
    flags = ["--seeds", "0", "--steps", "160", "--output", str(tmp_path / "table.txt")]
    monkeypatch.setattr(sys, "argv", ["run_vision.py", *flags])
    run_vision.main()
    table = (tmp_path / "table.txt").read_text()
    assert table in capsys.readouterr().out
    rows = {line.split("  ")[0]: line.split()[-3] for line in table.splitlines()[2:]}
    assert len(rows) == 10 and float(rows["untrained, nothing pruned"]) < 25
    assert all(float(score) > 60 for name, score in rows.items() if name.startswith("untrained, subnetwork"))
    assert float(rows["ResNet, dense"]) > 80
