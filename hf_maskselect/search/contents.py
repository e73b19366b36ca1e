"""A digest of what a value holds: data, the code of functions, and objects with both."""

import dis
import functools
import hashlib
import marshal
import sys
import time
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import has_length
from transformers.utils import is_datasets_available

from ..utils.files import bytes_of

MOST_SECONDS = 60  # to read the rows of a dataset one by one
_ROWS = 1000  # of a table that are hashed together
_PLAIN = frozenset({int, float, complex, bool, str, bytes, type(None)})
# Of a class or function: where it stands, and what Python computes from the rest.
_DESCRIPTIVE = {"__module__", "__doc__", "__dict__", "__weakref__", "__firstlineno__", "__static_attributes__"}
_DESCRIPTIVE |= {"__qualname__", "__abstractmethods__", "_abc_impl", "__annotations__", "__annotate_func__"}
_DESCRIPTIVE |= {"__annotations_cache__", "__parameters__", "__orig_bases__", "__match_args__", "__slotnames__"}
_MEMBERS = {property: ("fget", "fset", "fdel"), functools.cached_property: ("func",)}
_MEMBERS |= {staticmethod: ("__func__",), classmethod: ("__func__",), types.MethodType: ("__func__", "__self__")}


class NoDigest(Exception):
    """The content of a value is not known; the message says of which, and why."""


class Contents:
    """Collects the SHA-256 of values. Equal digests mean equal contents, in any process under the same libraries.

    A function counts with its code, defaults, closure and the globals that it uses, an object with its class and its
    state, as pickle takes it. What belongs to an installed library counts with its name and the library's version.

    known: names by `id` of objects that are not looked into.
    """

    def __init__(self, known: Mapping[int, str]) -> None:
        self._sha, self._known = hashlib.sha256(), known
        self._seen: dict[int, tuple[int, Any]] = {}  # with the objects, so that no other gets the same id

    def hex(self) -> str:
        """Return the digest of the values so far, in hexadecimal."""
        return self._sha.hexdigest()

    def add(self, value: Any) -> None:
        """Add one value.

        Raises:
            NoDigest: its content is not known, as of an open file.
        """
        kind = type(value)
        if kind in _PLAIN:
            self._sha.update(marshal.dumps(value, 2))
        elif isinstance(value, torch.Tensor):
            self._tensor(value)
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
            self._tag("array", value.dtype.str, value.shape)
            self._sha.update(np.ascontiguousarray(value).data)
        elif id(value) in self._known:
            self._tag("known", self._known[id(value)])
        elif id(value) in self._seen:
            self._tag("again", self._seen[id(value)][0])
        else:
            self._seen[id(value)] = len(self._seen), value
            self._container(value)

    def _container(self, value: Any) -> None:
        kind = type(value)
        if kind in (list, tuple):
            self._tag(kind.__name__, len(value))
            if _PLAIN.issuperset(map(type, value)):
                self._sha.update(marshal.dumps(value, 2))  # a row of tokens, at once
                return
            for item in value:
                self.add(item)
        elif kind in (dict, types.MappingProxyType):
            self._tag("dict", len(value))
            for key, item in value.items():
                self.add(key)
                self.add(item)
        elif kind in (set, frozenset):
            self._tag(kind.__name__, *sorted(digest_of(item, known=self._known) for item in value))
        elif isinstance(value, types.ModuleType):
            self._module(value)
        elif isinstance(value, type | types.FunctionType):
            self._code_or_name(value)
        elif isinstance(value, types.CodeType):
            self._code(value)
        elif kind in _MEMBERS:
            self._tag(kind.__name__)
            for name in _MEMBERS[kind]:
                self.add(getattr(value, name))
        else:
            self._object(value)

    def _tag(self, *parts: object) -> None:
        self._sha.update(repr(parts).encode())

    def _tensor(self, tensor: torch.Tensor) -> None:
        if tensor.layout is not torch.strided:
            raise NoDigest(f"a tensor of layout {tensor.layout}")
        self._tag("tensor", tensor.dtype, *tensor.shape)
        direct = tensor.is_cpu and tensor.is_contiguous() and tensor.dtype is torch.int64  # tokens, in the least time
        self._sha.update(tensor.numpy().data if direct else bytes_of(tensor))

    # -- code --------------------------------------------------------------------------------------------------------

    def _module(self, module: types.ModuleType) -> None:
        """Add a module: the file of the user's own, which functions may take anything from."""
        self._tag("module", module.__name__, version := version_of(module.__name__))
        file = getattr(module, "__file__", None)
        if version is None and file:
            self._sha.update(Path(file).read_bytes())

    def _code_or_name(self, value: Any) -> None:
        """Add a function or class: by its name if it belongs to a library, else with its code."""
        version = version_of(value.__module__)
        self._tag(type(value).__name__, value.__qualname__)
        if version is not None:
            self._tag(value.__module__, version)
        elif isinstance(value, type):
            for base in value.__bases__:
                self.add(base)
            for name, member in vars(value).items():
                if name not in _DESCRIPTIVE and not isinstance(member, types.GetSetDescriptorType):
                    self.add(name)
                    self.add(member)
        else:
            cells = [_cell(cell) for cell in value.__closure__ or ()]
            self.add(value.__code__)
            for part in (value.__defaults__, value.__kwdefaults__, cells, vars(value)):
                self.add(part)
            for name in sorted(_globals_of(value.__code__)):
                if name in value.__globals__:
                    self.add(name)
                    self.add(value.__globals__[name])

    def _code(self, code: types.CodeType) -> None:
        self._tag("code", code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        for constant in code.co_consts:
            self.add(constant)

    # -- objects -----------------------------------------------------------------------------------------------------

    def _object(self, value: Any) -> None:
        self.add(type(value))
        if isinstance(value, nn.Module):
            self._tag(str(value))
            self.add(dict(value.state_dict()))
        elif isinstance(value, PreTrainedTokenizerBase):
            # Not the padding and truncation of the last call, which a process may not have made.
            self._tag(sorted(value.get_vocab().items()), sorted(value.special_tokens_map.items()))
            self._tag(value.padding_side, value.truncation_side, value.model_max_length)
        elif type(value).__module__.startswith("evaluate_modules."):
            self._tag(type(value).__module__, value.config_name)  # its module has the digest of its script in its name
        elif is_datasets_available() and _is_table(value):
            self._table(value)
        else:
            self._pickled(value)

    def _pickled(self, value: Any) -> None:
        try:
            reduced: Any = value.__reduce_ex__(4)
        except Exception as error:  # an object that has no pickle raises whatever it likes
            raise NoDigest(f"a {type(value).__qualname__} ({error})") from error
        if isinstance(reduced, str):
            self._tag("global", type(value).__module__, getattr(value, "__module__", None), reduced)
            self.add(getattr(value, "__wrapped__", None))  # such as a function with a cache
            return
        for part in reduced[:3]:
            self.add(part)
        for items in reduced[3:5]:
            self.add(None if items is None else list(items))

    # -- rows --------------------------------------------------------------------------------------------------------

    def rows(self, dataset: Any) -> None:
        """Add all rows of a dataset. Those that are not in tables are read one by one, for at most a minute.

        Raises:
            NoDigest: the rows have an order of their own, or take longer.
        """
        if is_datasets_available() and _is_table(dataset):
            self._table(dataset)
            return
        if isinstance(dataset, IterableDataset) or not has_length(dataset):
            raise NoDigest(f"a {type(dataset).__qualname__}, which has no length")
        end = time.monotonic() + MOST_SECONDS
        self._tag("rows", len(dataset))
        rows: Any = dataset
        for index in range(len(dataset)):
            self.add(rows[index])
            self._seen.clear()  # a row is made anew at each access
            if time.monotonic() > end:
                raise NoDigest(f"a {type(dataset).__qualname__}, whose rows take more than {MOST_SECONDS} s to read")

    def _table(self, dataset: Any) -> None:
        """Add a `datasets.Dataset`. Not its own fingerprint, which depends on the times of files."""
        import pyarrow

        self._tag("table", len(dataset), str(dataset.features), dataset.format["type"], dataset.format["columns"])
        self.add(dataset.format["format_kwargs"])  # a transform
        for table in dataset.with_format("arrow").iter(_ROWS):
            plain, sink = table.combine_chunks().replace_schema_metadata(None), pyarrow.BufferOutputStream()
            with pyarrow.ipc.new_stream(sink, plain.schema) as stream:
                stream.write_table(plain)
            self._sha.update(sink.getvalue())


def digest_of(*values: Any, known: Mapping[int, str]) -> str:
    """Return the digest of values by `Contents`, in hexadecimal; raises a NoDigest if it is not known."""
    contents = Contents(known)
    try:
        for value in values:
            contents.add(value)
    except RecursionError as error:
        raise NoDigest("an object that is nested too deeply") from error
    return contents.hex()


def _is_table(value: Any) -> bool:
    import datasets

    return isinstance(value, datasets.Dataset)


def _cell(cell: types.CellType) -> Any:
    """Return what a closure holds; None before it is set."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _globals_of(code: types.CodeType) -> Iterator[str]:
    """Yield the global names that a function's code reads, also in functions inside it."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _globals_of(constant)


@functools.cache
def version_of(module: str | None) -> str | None:
    """Return the version of the library that has a module, empty if it tells none; None for the user's own code."""
    top = (module or "builtins").partition(".")[0]
    found = sys.modules.get(top)
    file = getattr(found, "__file__", None) or ""
    own = top not in sys.stdlib_module_names and top != __name__.partition(".")[0]
    if top == "__main__" or (own and not {"site-packages", "dist-packages"} & set(Path(file).parts)):
        return None
    return str(getattr(found, "__version__", ""))
