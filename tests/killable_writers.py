"""Kill a writer of folders at every file event, over an earlier good output, and look at the rest.

Every write runs in a fork of this process. Its file events (opened for writing, renamed, linked, deleted, made,
exchanged) are counted, and the process ends at the n-th: before it, or with the opened file cut to nothing, as a write
that was interrupted leaves it. Then the folder must hold the old output or the new one, file by file to the byte, and
the same write must succeed and leave nothing else.

The mode is "exchange", or "moves" where the system cannot exchange two folders. With the mode "full" the disk is full
from the n-th event on.
"""

import errno
import json
import os
import shutil
import sys
import traceback
from concurrent.futures import Future
from hashlib import sha256
from pathlib import Path

import torch
import transformers.modeling_utils
from tiny import make, make_trainer, save_pruned
from transformers import BertForSequenceClassification

import hf_maskselect.masking.maskset
from hf_maskselect import export_semi_structured, load_pruned, load_semi_structured, pack, prunable_weights
from hf_maskselect.export import onnx
from hf_maskselect.storage.pack import unpack
from hf_maskselect.storage.runs import last_checkpoint
from hf_maskselect.training import hub
from hf_maskselect.utils import folders
from hf_maskselect.utils.digests import weights_digest

FULL, KILLED, REFUSED = errno.ENOSPC, 9, 3
MAKING = ("open", "os.mkdir", "os.link", "os.symlink")
EVENTS = {*MAKING, "os.rename", "os.remove", "os.rmdir", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR


class Events:
    """Counts the file events below a folder, and ends the process at one of them or fills the disk from there on."""

    def __init__(self, root, number=0, full=False):
        self.root, self.number, self.full = os.fspath(root), number, full
        self.names = []

    def watch(self):
        sys.addaudithook(self.audit)
        folders.exchange = self.watched_exchange(folders.exchange)
        for module, name, path_at in (
            (torch, "save", 1),
            (hf_maskselect.masking.maskset, "save_file", 1),
            (transformers.modeling_utils, "safe_save_file", 1),
        ):
            setattr(module, name, self.watched(getattr(module, name), path_at))

    def watched_exchange(self, exchange):
        def run(first, second):
            self.happen("exchange")
            exchange(first, second)

        return run

    def watched(self, write, path_at):
        """Watch a writer that is not in Python: it is killed before it writes, or in the middle."""

        def run(*args, **kwargs):
            path = args[path_at]
            if isinstance(path, str | os.PathLike):
                self.happen("open", path)
                write(*args, **kwargs)
                self.happen("half", path)
            else:
                write(*args, **kwargs)

        return run

    def audit(self, event, args):
        if event not in EVENTS or event == "open" and not (isinstance(args[2], int) and args[2] & WRITING):
            return
        path = args[0]
        if isinstance(path, str | bytes | os.PathLike) and self.is_below(os.fsdecode(path)):
            self.happen(event, path)
            if event == "open" and args[2] & os.O_TRUNC and not os.path.isdir(path):
                self.happen("half", path)

    def is_below(self, path):
        return not os.path.isabs(path) or path.startswith(self.root)  # `rmtree` gives names without their folder

    def happen(self, event, path=None):
        self.names.append(f"{event} {path or ''}")
        if self.full and len(self.names) >= self.number > 0 and event in MAKING:
            raise OSError(FULL, os.strerror(FULL))
        if not self.full and len(self.names) == self.number:
            if event == "half":
                self.number = 0
                size = os.path.getsize(path) // 2 if os.path.exists(path) else 0
                os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
                os.truncate(path, size)
            os._exit(KILLED)


def digest(model):
    return weights_digest(model.state_dict())


def pruned(place, seed, **changes):
    """A trainer, untrained, whose model has masks."""
    model = make(seed=seed, **changes)
    prune_(model)
    return make_trainer(place.out, model)


def prune_(model):
    with torch.no_grad():
        for weight in prunable_weights(model).values():
            weight[weight.abs() < weight.abs().median()] = 0


def saved(place):
    """`save_model` over the model of an earlier run, with another shape."""
    earlier, trainer = pruned(place, 1, intermediate_size=32), pruned(place, 2)
    trainer.args.pack_on_save = True

    def prepare():
        earlier.save_model()
        (place.out / "runs" / "today").mkdir(parents=True)
        (place.out / "runs" / "today" / "events").write_text("a log of somebody else")

    return prepare, trainer.save_model, lambda: digest(BertForSequenceClassification.from_pretrained(place.out))


def checkpointed(place):
    """A checkpoint of a step that an earlier run saved too."""
    earlier, trainer = pruned(place, 1, intermediate_size=32), pruned(place, 2)
    for each in (earlier, trainer):
        each.create_optimizer_and_scheduler(12)
        each.state.global_step = 4
    folder = place.out / "checkpoint-4"

    def resumable():
        assert last_checkpoint(place.out) == str(folder)
        return digest(BertForSequenceClassification.from_pretrained(folder))

    def save(each):
        transformers.set_seed(each.model.config.intermediate_size)
        each._save_checkpoint(each.model, None)

    return lambda: save(earlier), lambda: save(trainer), resumable


def packed(place):
    """`pack` over the packed file of an earlier model."""
    earlier, source = place.root / "earlier", place.root / "source"

    def prepare():
        save_pruned(earlier, intermediate_size=32)
        save_pruned(source, sparsity=0.5)
        pack(earlier, place.out)

    return prepare, lambda: pack(source, place.out), lambda: digest(load_pruned(place.out)[0])


def packed_beside(place):
    """`pack` into the folder of the model, over a file that rounds its values."""

    def prepare():
        save_pruned(place.out)
        pack(place.out, place.out, values="bf16")

    return prepare, lambda: pack(place.out, place.out), lambda: digest(load_pruned(place.out)[0])


def unpacked(place):
    """`unpack` in the folder of the packed file."""

    def prepare():
        save_pruned(place.root / "source")
        pack(place.root / "source", place.out)

    return prepare, lambda: unpack(place.out, place.out), lambda: digest(load_pruned(place.out)[0])


def exported(place):
    """The 2:4 export over that of an earlier model."""
    earlier, source = place.root / "earlier", place.root / "source"

    def prepare():
        save_pruned(earlier, 0.5, "2:4", intermediate_size=32)
        save_pruned(source, 0.5, "2:4")
        export_semi_structured(earlier, place.out)

    return prepare, lambda: export_semi_structured(source, place.out), lambda: digest(load_semi_structured(place.out))


def graphed(place):
    """The ONNX export over that of an earlier model. The exporter itself is slow, and writes two short files here."""
    earlier, source = place.root / "earlier", place.root / "source"
    vars(onnx)["_export"], vars(onnx)["_name_weights"] = short_export, lambda path, digest: None

    def prepare():
        save_pruned(earlier, intermediate_size=32)
        save_pruned(source)
        onnx.export_onnx(earlier, place.out)

    return prepare, lambda: onnx.export_onnx(source, place.out), lambda: (place.out / "model.onnx").read_text()


def pushed(place):
    """A push at a save. What is uploaded is a copy, and the output stays."""
    earlier, trainer = pruned(place, 1, intermediate_size=32), pruned(place, 2)
    trainer.state.global_step, trainer.hub_model_id, trainer.push_in_progress = 4, "someone/model", None
    vars(hub)["plot"] = lambda *args: None
    vars(transformers.trainer)["hf_api"] = NoHub

    def prepare():
        earlier.save_model()
        trainer.create_optimizer_and_scheduler(12)
        trainer._save_checkpoint(trainer.model, None)

    def push():
        trainer._push_from_checkpoint(str(place.out / "checkpoint-4"))
        trainer._finish_current_push()

    return prepare, push, lambda: digest(load_pruned(place.out)[0])


class NoHub:
    """Takes an upload at once."""

    def upload_folder(self, folder_path, **options):
        load_pruned(folder_path)
        done = Future()
        done.set_result(None)
        return done


def short_export(model, folder, inputs, tolerance):
    for name in ("model.onnx", "model.onnx.data"):
        (folder / name).write_text(digest(model))
    return onnx.OnnxReport(folder / "model.onnx", 0, 0, 0.0)


WRITERS = {
    "save_model": saved,
    "checkpoint": checkpointed,
    "pack": packed,
    "pack_beside": packed_beside,
    "unpack": unpacked,
    "export": exported,
    "onnx": graphed,
    "push": pushed,
}


def no_exchange(first, second):
    raise OSError(errno.ENOTSUP, "no exchange here")


class Place:
    """A folder to write into, the earlier good output that lies there, and a write.

    root: holds the folder `run/out` and whatever the write reads.
    """

    def __init__(self, root, mode):
        self.root, self.mode = Path(root), mode
        self.run, self.out, self.kept = self.root / "run", self.root / "run" / "out", self.root / "kept"

    def keep(self):
        """Take what lies in the folder now as the earlier output."""
        shutil.copytree(self.run, self.kept)

    def restore(self):
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.copytree(self.kept, self.run)

    def fork(self, write, number=0):
        """Run `write` in a fork that ends at event `number`; return its exit code, its events, and what it returns."""
        told = self.root / "told"
        told.unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            code = 1
            torch.set_num_threads(1)  # torch's threads are gone after a fork: make them again, once
            try:
                if self.mode == "moves":
                    folders.exchange = no_exchange
                events = Events(self.run, number, self.mode == "full")
                events.watch()
                result = None
                try:
                    result = write()
                    code = 0
                except OSError as error:
                    if self.mode != "full" or "make room" not in str(error):
                        raise
                    code = REFUSED
                events.root = "nowhere"
                told.write_text(json.dumps([events.names, result if isinstance(result, str) else None]))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code not in (0, KILLED, REFUSED):
            sys.exit(f"the job failed at event {number} and leaves {self.left()}")
        return code, *(json.loads(told.read_text()) if told.exists() else ([], None))

    def content(self):
        """A digest of each file, without what begins with an underscore."""
        names = [path for path in sorted(self.run.rglob("*")) if path.is_file()]
        parts = {path: path.relative_to(self.run).parts for path in names}
        shown = [path for path in names if not any(part.startswith("_") for part in parts[path])]
        return {"/".join(parts[path]): digest_of(path) for path in shown}

    def left(self):
        return sorted(str(path.relative_to(self.run)) for path in self.run.rglob("_*"))


def digest_of(path):
    """The digest of a file; of safetensors without the order of the fields in the header, which is a random one."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        size = int.from_bytes(content[:8], "little")
        content = content[8 + size :] + json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True).encode()
    return sha256(content).hexdigest()


def differing(found, expected):
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def kill_all(root, step, *jobs):
    """Do `kill_everywhere` for every job, "WRITER:MODE", and return what each returns."""
    transformers.logging.disable_progress_bar()
    return {job: kill_everywhere(root / job.replace(":", "-"), step, *job.split(":")) for job in jobs}


def kill_everywhere(root, step, writer, mode):
    """Kill a write at every `step`-th event; return the numbers of events, of kills, and of old and of new folders.

    Without an exchange of folders a write does the same as with one until it would exchange them: fewer kills there.
    """
    place = Place(root, mode)
    prepare, write, read = WRITERS[writer](place)
    place.fork(prepare)
    place.keep()
    place.restore()
    old, before = place.content(), place.fork(read)[2]
    events = place.fork(write)[1]
    new, after = place.content(), place.fork(read)[2]
    if place.left() or bool(differing(old, new)) == (writer == "push"):
        sys.exit(f"a write leaves {place.left()} and changes {differing(old, new)}")
    outcomes, numbers = {"old": 0, "new": 0}, range(1, len(events) + 1, step)
    if mode == "moves":
        exchange = 1 + events.index("exchange ")
        numbers = [*range(1, exchange, 8 * step), *range(exchange, len(events) + 1, step)]
    for number in numbers:
        place.restore()
        code = place.fork(write, number)[0]
        event = f"event {number} of {len(events)} ({events[number - 1]}, code {code})"
        if code == 0 and mode != "full":
            sys.exit(f"{event}: the write was to be killed and was not")
        if mode == "moves":
            if place.fork(lambda: plainly(read))[2] not in (before, after, "refused"):
                sys.exit(f"{event}: a plain load mixes two models")
            place.fork(lambda: finish_all(place.out))
        found = place.content()
        kind = "old" if found == old else "new" if found == new else None
        if kind is None or (code == REFUSED and kind == "new") or (code == 0 and found != new):
            sys.exit(f"{event}: old but for {differing(found, old)}, new but for {differing(found, new)}")
        if code == REFUSED and place.left():
            sys.exit(f"{event}: {place.left()} is left")
        outcomes[kind] += 1
        place.fork(write)
        if place.content() != new or place.left():
            sys.exit(f"{event}: the next write leaves {place.left()} and {differing(place.content(), new)}")
    return {"events": len(events), "kills": len(numbers), **outcomes}


def finish_all(out):
    folders.finish(out)
    last_checkpoint(out)


def plainly(read):
    try:
        return read()
    except OSError:
        return "refused"
