"""`optimum-cli hfquant ...`: found by optimum in this folder, which packages share and which has no `__init__.py`.

It is read at every start of `optimum-cli`, so it imports nothing heavy.  The commands are hfquant's own: their options
are taken from there, and what was typed is handed on as it is.
"""

import sys
from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

NAMES = {
    "compress": "Compress a model into a folder that loads in transformers, and measure what it cost.",
    "eval": "Measure a compressed model, and how far it is from the original.",
    "diagnose": "Draw why a model is hard to compress, and what compressing did to it.",
    "inspect": "Show every compressed layer.",
    "recipes": "List the recipes that hfquant brings.",
    "export": "Write a compressed model in another format, with the same codes.",
    "push": "Publish a compressed model on the Hub.",
}


class HfquantCommand(BaseOptimumCLICommand):
    """One of hfquant's commands."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.prefix_chars = "\0"  # every word is an argument, `--help` too: hfquant reads them
        parser.add_argument("words", nargs=REMAINDER)

    def run(self) -> None:
        from hfquant.cli import main

        sys.argv = ["hfquant", self.COMMAND.name, *self.args.words]
        main()


class HfquantGroup(BaseOptimumCLICommand):
    """`optimum-cli hfquant`"""

    COMMAND = CommandInfo(name="hfquant", help="Compress generative language models with hfquant.")
    SUBCOMMANDS = tuple(CommandInfo(name, text, HfquantCommand) for name, text in NAMES.items())


REGISTER_COMMANDS = [HfquantGroup]
