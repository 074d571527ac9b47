"""Writes the stored states of test_stored_states.py, a file for each tiny model: ``PYTHONPATH=. python tests/data/make_states.py``.

They stand for the files that users have: later versions have to load them. A new class gets its file by its name,
``make_states.py NewVAE``; the others stay as they are.
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "states"
sys.path.insert(0, str(FOLDER.parents[1]))

from _tiny_models import TINY, numbers, scrambled  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import fastvae  # noqa: E402

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or TINY:
        model = scrambled(name)
        stored = {f"state.{key}": tensor.clone() for key, tensor in model.state_dict().items()}
        stored |= {f"output.{key}": tensor.clone() for key, tensor in numbers(name, model).items()}
        save_file(stored, FOLDER / f"{name}.safetensors", {"version": fastvae.__version__})
