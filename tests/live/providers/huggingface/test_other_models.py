"""Models of other libraries run as before once transformers is imported."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from modelcli.live import providers, trace
from modelcli.live.inputs import Inputs
from modelcli.live.mult_adds import MultAdds
from tests.conftest import Cli


def test_a_class_may_redefine_names_of_torch(cli: Cli, folder: Path) -> None:
    import transformers  # noqa: F401 -- what is imported is what is tested

    (folder / "own.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.modules = [1]\n"
        "        self.layer = nn.Linear(4, 3)\n"
        "    def forward(self, x):\n"
        "        return self.layer(x)\n"
    )
    assert cli("summary", "own.py:Net", "--input-size", "2,4", "--json").json["layers"][0]["output_shape"] == [2, 3]


def test_nothing_surrounds_the_pass_of_a_model_that_is_not_of_transformers() -> None:
    from transformers import modeling_utils

    model = nn.Linear(4, 3)
    for half in providers.in_use():
        with half.during_pass(model, "meta") as entered:
            assert entered is None
    assert modeling_utils is not None
    with torch.device("meta"):
        made = nn.Linear(4, 3)
    counter = MultAdds()
    seen = trace.run(made, Inputs(((2, 4),)).tensors("meta"), counter=counter)
    assert seen.failure is None
    assert counter.total == 2 * 4 * 3
