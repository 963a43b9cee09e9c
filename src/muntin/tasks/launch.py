"""The processes of `--set devices=N` on one machine, by torchrun's own agent."""

import logging
import os
import signal
import sys
from collections.abc import Sequence

from muntin.errors import UserError

SECONDS = "110"  # to save in when a signal comes, before processes are killed
PROGRAM = "import sys; from muntin.cli import main; sys.exit(main(sys.argv[1:]))"


def launch(arguments: Sequence[str], devices: int, nodes: int = 1, rendezvous: str = "") -> int:
    """Run the command `muntin ARGUMENTS` in `devices` processes of this machine, one of `nodes`; their exit code.

    When one dies, the others are ended, and the message names its rank. Raises `UserError` where there are not so many
    GPUs.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if torch.cuda.is_available() and devices > torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"devices={devices}: this machine has {count} GPUs; give a number up to that")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SECONDS)
    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=devices,
        rdzv_backend="c10d",
        rdzv_endpoint=rendezvous or "localhost:0",
        run_id=rendezvous or str(os.getpid()),
        max_restarts=0,
        monitor_interval=0.2,
        start_method="spawn",
    )
    for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what they would say is said below
    try:
        elastic_launch(config, sys.executable)("-c", PROGRAM, *arguments)
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            killed = f"rank {rank} (process {failure.pid}) was killed by {name}; the others were ended"
            print(f"muntin: {killed}; go on with --resume", file=sys.stderr)
            return 1
        if failure.exitcode < 128:
            print(f"muntin: rank {rank} failed with code {failure.exitcode}; its message is above", file=sys.stderr)
        return failure.exitcode
    return 0
