"""Start the ranks of a distributed run with the environment that `torchrun` gives them."""

import socket

from forked import finish, start


def start_ranks(function, folder, ranks, *arguments):
    """Start `function(*arguments)` as every rank; return their logs, which lie in the folder, and their processes."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sizes = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    common = {**sizes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
    processes = [
        start(function, *arguments, log=log, RANK=str(rank), LOCAL_RANK=str(rank), **common)
        for rank, log in enumerate(logs)
    ]
    return logs, processes


def launch_ranks(function, folder, ranks, *arguments):
    """Run `function(*arguments)` as every rank to the end; fails with the errors of all."""
    logs, processes = start_ranks(function, folder, ranks, *arguments)
    codes = finish(processes, limit=600)
    assert codes == [0] * ranks, (codes, [log.read_text()[-3000:] for log in logs])
