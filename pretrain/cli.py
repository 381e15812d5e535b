"""The command ``medley``: one subcommand a task, each in the module that does the work."""

import argparse
import importlib
import sys

from pretrain import __version__
from pretrain.errors import EXIT_FAILURE, EXIT_USER_ERROR, RunError, UserError

# name → (module with ``add_arguments(parser)`` and ``run(args)``, help line)
COMMANDS = {
    "corpus": ("pretrain.data.embedded", "write the embedded corpus: the documentation of the installed packages"),
    "prepare": ("pretrain.data.prepare", "turn text into a token store"),
    "launch": ("pretrain.launching", "start a run's ranks on this machine, and start them again when they fail"),
    "annotate": ("pretrain.data.annotate", "mark a prepared corpus for masking: names and dates, parts of speech"),
    "learn-mask": ("pretrain.masking.learning.command", "learn which spans to mask"),
    "tartan": ("pretrain.tartan", "train an end task together with auxiliary objectives, then alone"),
    "score": ("pretrain.influence.sequential.score", "score the samples of a corpus by their self-influence"),
    "filter": ("pretrain.influence.sequential.filter", "make a view of a corpus without its highest scores"),
    "influence": ("pretrain.influence.report", "draw what a run's weigher saw: scores, weights, samples"),
    "evaluate": ("pretrain.evaluation.command", "fine-tune a model on an end task over several seeds"),
    "export": ("pretrain.export", "turn a checkpoint into a Hugging Face folder"),
    "soup": ("pretrain.courses.command", "average models of one initialisation"),
    "report": ("pretrain.report", "print a run's table: losses at start and end, speed, end-task scores"),
    "plan": ("pretrain.planning.command", "say which ZeRO stage and micro-batch fit on some GPUs, and what is sent"),
    "slurm": ("pretrain.slurm", "print a job script for SLURM: a recipe on so many nodes and GPUs"),
    "bench": ("pretrain.bench", "measure the fused ops against their floors and their peers"),
    "doctor": ("pretrain.doctor", "say what this machine has, what works, and how to mend what does not"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; return its exit code (2 for the user's mistakes, 1 for failures, told in one line)."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="medley", description="Pre-training of language encoders on many objectives.")
    parser.add_argument("--version", action="version", version=f"medley {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in argv if not word.startswith("-")), None)
    try:
        for name, (module, text) in COMMANDS.items():
            subparser = subparsers.add_parser(name, help=text, description=text)
            if name == chosen:  # importing only what runs keeps --help instant
                command, usage = importlib.import_module(module), subparser
                command.add_arguments(subparser)
        args, unknown = parser.parse_known_args(argv)  # exits where no command was chosen
        if hasattr(args, "overrides"):  # argparse does not know those that come behind an option
            args.overrides += [word for word in unknown if not word.startswith("-")]
            unknown = [word for word in unknown if word.startswith("-")]
        if unknown:
            usage.error(f"unrecognized arguments: {' '.join(unknown)}")
        command.run(args)
    except UserError as error:
        print(f"medley {chosen}: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except RunError as error:
        print(f"medley {chosen}: failed: {error}", file=sys.stderr)
        return EXIT_FAILURE
    except KeyboardInterrupt:
        print(f"medley {chosen}: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
