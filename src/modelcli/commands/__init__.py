"""What each command does: one file a use case, from a request to a frozen result that can be shown.

`cli` turns options into requests, and results into views. Nothing is imported here, so that a look at a file imports
only what it needs.
"""
