"""The command line: ``fastvae``, or ``python -m fastvae``."""

import re
import sys

from fastvae import info
from fastvae._extras import MissingExtraError, extra
from fastvae.training.errors import TrainingError

HELP = """usage: fastvae COMMAND [options]

Training:
  fit           trains a network: fastvae fit --config configs/conv_vae_mnist.yaml, or --network VAE_conv --data MNISTDigits

With a checkpoint: fastvae validate|test CHECKPOINT
  validate      evaluates it on the validation part of the data: those of the training, or --data
  test          every metric that applies, on the test part: a table, and a file beside the checkpoint

With a checkpoint: fastvae COMMAND CHECKPOINT --out DIR
  sample        pictures of draws from the prior
  reconstruct   pictures of test samples above their reconstructions
  interpolate   pictures of ways between test samples
  traverse      pictures of single latent dimensions
  encode        the latents of a data set as .npz, with labels and file names

With several checkpoints: fastvae compare CHECKPOINT CHECKPOINT --out DIR
  compare       tests them, and sets figures and pictures side by side

In the browser: fastvae explore CHECKPOINT
  explore       a page on this machine: sliders for the latent dimensions, samples, reconstructions of your images, interpolations

  demo          trains VAEs on real digits, measures plain torch beside fastvae, and writes pictures and a report
  info          versions, instruction sets and backends of this machine

Each command has its own --help."""

TRAININGS = ("fit", "validate", "test")
AFTER_TRAINING = ("sample", "reconstruct", "interpolate", "traverse", "encode", "compare", "explore")
# The exit status that a shell gives a process that Ctrl-C ended.
INTERRUPTED = 128 + 2


def main(arguments: list[str] | None = None) -> None:
    """Runs a command; ``arguments`` are those of the process by default."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        run(arguments)
    except KeyboardInterrupt:
        print("fastvae: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (MissingExtraError, TrainingError) as error:
        sys.exit(f"fastvae: {in_one_line(error)}")


def in_one_line(error: Exception) -> str:
    """The message; that of a worker process is a traceback, whose last line has the error's class before it."""
    return re.sub(r"^[\w.]+Error: ", "", str(error).strip().splitlines()[-1])


def run(arguments: list[str]) -> None:
    """Imports what the command needs, and nothing else."""
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(HELP)
    elif command == "info" and len(arguments) == 1:
        # Needs nothing that is optional, so that it can tell what is missing.
        info.main()
    elif command in TRAININGS:
        from fastvae.training import cli

        cli.main(arguments)
    elif command in AFTER_TRAINING:
        from fastvae.training import commands

        commands.main(arguments)
    elif command in ("demo", "info"):
        from fastvae.training.demo import demo

        with extra("train"):
            from jsonargparse import auto_cli
        auto_cli({"demo": demo, "info": info.main}, args=arguments, prog="fastvae", as_positional=False)
    else:
        from fastvae.models.registry import nearest

        raise TrainingError(f"command: got {command!r}, {nearest(command, [*TRAININGS, *AFTER_TRAINING, 'demo', 'info'])}")


if __name__ == "__main__":
    main()
