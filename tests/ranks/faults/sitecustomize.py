"""Give single ranks a fault: Python imports this first where the folder is on PYTHONPATH. Tests alone put it there.

`RANK_FAULTS` is a JSON object: for a rank, what to do to it: `most` limits the bytes of the files that it writes, as a
full disk does; `slow` makes it note its process in `rank-N.writes` when it first writes, and wait so many seconds
before each write;
`other_plan` lets it plan larger shards; `run` is a program to run in it before it writes.
"""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

_rank = os.environ.get("RANK") or os.environ.get("MODELCLI_WORKER", "").partition(":")[0]
_fault = json.loads(os.environ.get("RANK_FAULTS", "{}")).get(_rank)


def _put_in_place(fault):
    if "most" in fault:
        import resource

        sys.dont_write_bytecode = True  # Python would leave the beginning of a file, and read that the next time
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["most"], fault["most"]))
    from modelcli.writing import output

    original = output.Output.put

    def put(self, offset, source):
        if "run" in fault:
            exec(fault.pop("run"))
        if "slow" in fault:
            pid = Path(f"rank-{_rank}.pid")
            pid.write_text(str(os.getpid()))
            pid.replace(f"rank-{_rank}.writes")
            time.sleep(fault["slow"])
        original(self, offset, source)

    output.Output.put = put
    if "other_plan" in fault:
        from modelcli import writing

        write = writing.write
        writing.write = lambda plan, path, options, **more: write(
            plan, path, replace(options, max_shard_bytes=options.max_shard_bytes * 2), **more
        )


# torchrun itself, and the programs that it starts first, are no ranks.
if _fault is not None and "modelcli" in sys.orig_argv:
    sys.orig_argv.remove("modelcli")  # not again in a process below
    _put_in_place(_fault)
