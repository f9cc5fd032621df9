"""The parts of a script that edits are written with: the text itself, and how it names modules and tensors.

The handler of each edit in `modelcli.live.surgery` writes its statements:

    script_lines(edit, step)                     for a model of known architecture
    state_dict_script_lines(edit, step, state)   for a state dict

A handler without one of them has no such statements. `script_lines_together(edits, step)` is for an edit that may
resolve to several lines that go together. The whole script is put together in `modelcli.live.scripting`.
"""
