"""How the files in a folder of `torch.distributed.checkpoint` are called."""

#: The file that describes the folder, and the suffix of the files that the ranks write.
METADATA, RANK_SUFFIX = ".metadata", ".distcp"

#: The file beside them with modelcli's record, which the format has no place for.
RECORD = "modelcli.json"
