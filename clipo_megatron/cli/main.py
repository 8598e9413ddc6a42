"""`clipo COMMAND`: reads the command line, turns errors into one clear line and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from clipo_megatron.cli import bench, check, ckpt, data, doctor, evaluate, launch, plan, status, train, why
from clipo_megatron.doctor.finding import host_name
from clipo_megatron.errors import ClipoError, ConfigError
from clipo_megatron.slurm.job_folder import ATTEMPT_VARIABLE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done (or stopped on request, with a checkpoint), 1 the run failed, 2 the input can't be run, 130 interrupted.
    """
    parser = argparse.ArgumentParser(prog="clipo", description="Reinforcement learning with a contrastive reward.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (train, evaluate, data, plan, doctor, launch, status, why, check, bench, ckpt):
        command.add_parser(commands)
    parsed, unknown = parser.parse_known_args(arguments)
    # argparse takes a list of key=value only in one piece; users append them after options as well.
    if "overrides" in parsed and all("=" in argument and not argument.startswith("-") for argument in unknown):
        parsed.overrides = [*parsed.overrides, *unknown]
    elif unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return parsed.run(parsed)
    except ConfigError as error:
        print("\n".join(_told(parsed.command, problem) for problem in error.problems), file=sys.stderr)
        return 2
    except (ClipoError, OSError) as error:
        print(_told(parsed.command, str(error)), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("clipo: interrupted", file=sys.stderr)
        return 130


def _told(command: str, problem: str) -> str:
    """The line of a problem; within a job of SLURM it names the host, and `clipo why` looks for it."""
    if not os.environ.get(ATTEMPT_VARIABLE):
        return f"clipo: {problem}"
    return f"clipo: error: {host_name()}: {'driver' if command == 'train' else command}: {' '.join(problem.split())}"


if __name__ == "__main__":
    raise SystemExit(main())
