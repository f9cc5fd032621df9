"""What each command does: one file for each use case, which turns a request into a frozen result.

`cli` turns options into requests, and results into views. This package imports nothing, so that showing a file
imports only what it needs.
"""
