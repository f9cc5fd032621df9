"""How the files in a folder of shards are called."""

from modelcli.checkpoints.safetensors import SUFFIX

#: How the name of every index ends.
INDEX_SUFFIX = ".index.json"
#: The index that modelcli writes.
WRITTEN_INDEX = f"model{SUFFIX}{INDEX_SUFFIX}"
