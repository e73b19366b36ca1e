"""Every benchmark imports: the package's modules and names that it uses exist."""

import importlib.util
import sys
from pathlib import Path

import pytest

PARTS = ("common", "structured_methods", "trials_table")  # of other benchmarks
BENCHMARKS = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_a_benchmark_imports(path, monkeypatch):
    monkeypatch.syspath_prepend(path.parent)  # benchmarks import each other by plain name
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look their module up
    spec.loader.exec_module(module)
    assert module.__doc__ and (callable(getattr(module, "main", None)) or path.stem in PARTS)
