"""Folders of shards: several files of tensors, and an index that says which file holds which tensor."""
