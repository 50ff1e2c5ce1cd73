"""`tsa report` and `tsa capture` without the rest of the command line."""

from __future__ import annotations

import argparse

from token_sparse_attention.report.command import add_commands


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()

    def make(commands, name, summary, example):  # noqa: ARG001
        command = commands.add_parser(name)
        command.add_argument("--json", action="store_true")
        return command

    add_commands(parser.add_subparsers(), make)
    args = parser.parse_args([str(argument) for argument in arguments])
    return args.handler(args)
