"""Compress to a budget: the size, the loss or the speed is named, the bits of every layer are chosen."""

from .decide import Decision, decide
from .door import Case, choose_recipe, open_case, table_of
from .table import Option, Row, Table

__all__ = ["Case", "Decision", "Option", "Row", "Table", "choose_recipe", "decide", "open_case", "table_of"]
