"""The loop of a fuzzer: one input after another, each with a limit on its time."""

from __future__ import annotations

import random
import time

from modelcli.errors import ModelcliError
from tests.fuzz.mutations import mutated
from tests.fuzz.reading import Target

#: An input that takes longer is a fault: it would be a hang with a larger file.
SECONDS = 2.0


def run(target: Target, inputs: int, seed: int) -> list[str]:
    """Run a parser on so many inputs, and tell of each that raised what is no error of modelcli's, or took long."""
    draw = random.Random(f"{target.name} {seed}")
    faults = []
    for number in range(inputs):
        data = mutated(target.seeds, target.words, draw)
        start = time.process_time()
        try:
            target.run(data)
        except ModelcliError as error:
            if error.exit_code not in (2, 3, 4, 5) or not error.message:
                faults.append(f"{number}: an error of exit code {error.exit_code} for {data!r}")
        except Exception as error:
            faults.append(f"{number}: {type(error).__name__}: {error} for {data!r}")
        if time.process_time() - start > SECONDS:
            faults.append(f"{number}: {time.process_time() - start:.1f} s for {data!r}")
    return faults
