"""What edits need to write themselves as statements of a script: its text, and expressions for modules and tensors.

The handler of each edit in `modelcli.live.surgery` may define two functions:

    script_lines(edit, step)                     returns the statements for a model of known architecture
    state_dict_script_lines(edit, step, state)   returns the statements for a state dict

A handler without one of them cannot be written as statements there. `script_lines_together(edits, step)` is for an edit
that may resolve to several lines that belong together. `modelcli.live.scripting` assembles the whole script.
"""
