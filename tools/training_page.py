"""Runs all commands of docs/training.md as they stand there, and takes the pictures that the page shows."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/training.md"
PICTURES = ROOT / "docs/images/training"


def blocks(page: str) -> list[tuple[str, str]]:
    """The language and the text of each block of code that can be run, in order."""
    return re.findall(r"^```(python|sh)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def run(page: str, folder: Path) -> None:
    """Runs the blocks in a folder, one after the other. The commands are those of this checkout."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for language, text in blocks(page):
        if language == "python":
            subprocess.run([sys.executable, "-c", text], cwd=folder, env=environment, check=True)
            continue
        for line in text.splitlines():
            name, *arguments = line.split()
            if name != "fastvae":
                raise ValueError(f"{PAGE.name}: got a command {name!r}, takes fastvae")
            subprocess.run([sys.executable, "-m", "fastvae", *arguments], cwd=folder, env=environment, check=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run(PAGE.read_text(), Path(folder))
        PICTURES.mkdir(parents=True, exist_ok=True)
        for picture in (Path(folder) / "out").glob("*.png"):
            shutil.copy(picture, PICTURES)


if __name__ == "__main__":
    main()
