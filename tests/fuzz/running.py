"""The loop of a fuzzer: one input after another, each with a limit on its time, all with one on their memory."""

from __future__ import annotations

import random
import time

from modelcli.errors import ModelcliError
from tests.fuzz import limits
from tests.fuzz.target import Target

#: Seconds for one input. Taking longer is a fault, because a larger file would hang.
SECONDS = 2.0
#: The bytes that a parser may allocate. The inputs are small, so more would mean that it trusts a size in the input.
MEMORY = 1 << 30


def run(target: Target, inputs: int, seed: int) -> list[str]:
    """Run a parser on inputs. Returns a text for each that raised an error other than modelcli's, or took too long.

    An input that caused a forbidden event, such as an import or a process, is a fault as well.
    """
    draw = random.Random(f"{target.name} {seed}")
    faults: list[str] = []
    with limits.on_memory(MEMORY):
        for number, data in enumerate(target.nasty):
            faults += _faults_of(target, data, f"nasty {number}")
        for number in range(inputs // target.one_in):
            faults += _faults_of(target, target.made(draw), str(number))
    return faults


def _faults_of(target: Target, data: bytes, number: str) -> list[str]:
    faults = []
    start = time.process_time()
    with limits.watched(data, target.forbidden) as seen:
        try:
            with limits.on_time(SECONDS):
                target.run(data)
        except ModelcliError as error:
            if error.exit_code not in (2, 3, 4, 5) or not error.message:
                faults.append(f"an error of exit code {error.exit_code}")
            if "can't allocate" in error.message:  # torch's message when memory is exhausted
                faults.append(error.message)
        except limits.TookTooLongError:
            faults.append(f"no end in {SECONDS} s")
        except Exception as error:
            faults.append(f"{type(error).__name__}: {error}")
    if not faults and time.process_time() - start > SECONDS:
        faults.append(f"{time.process_time() - start:.1f} s")
    faults += seen
    shown = repr(data) if len(data) < 2000 else f"{data[:200]!r}... of {len(data):,} bytes"
    return [f"{number}: {fault} for {shown}" for fault in faults]
