"""Writes pythae_losses.json: losses and gradients of pythae 0.1.2 for the cases of tests/_pythae.py.

``python tests/data/make_pythae_losses.py``, where pythae is installed, writes the table again.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from _pythae import CASES, PATH, their_figures

if __name__ == "__main__":
    PATH.write_text(json.dumps({name: their_figures(case) for name, case in CASES.items()}, indent=1) + "\n")
