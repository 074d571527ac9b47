"""The command line: ``python -m fastvae``."""

import sys

from fastvae import info
from fastvae.training._extras import MissingExtraError, extra
from fastvae.training.demo import demo


def main(arguments: list[str] | None = None) -> None:
    """Runs a subcommand; ``arguments`` are those of the process by default."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["info"]:
        # Needs nothing that is optional, so that it can tell what is missing.
        info.main()
        return
    try:
        with extra("train"):
            from jsonargparse import auto_cli
        auto_cli({"demo": demo, "info": info.main}, args=arguments, prog="fastvae", as_positional=False)
    except MissingExtraError as error:
        sys.exit(f"fastvae: {error}")


if __name__ == "__main__":
    main()
