"""`python -m modelcli`."""

import sys

if not sys.flags.safe_path and sys.path:
    # Python puts the current folder first: a torch.py that lies in it would be imported in the place of torch. A model
    # of the user's own is found in the current folder all the same, after what is installed.
    del sys.path[0]

from modelcli.start import run

run()
