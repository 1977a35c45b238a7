"""Prints the tables of docs/settings.md."""

from kvindexer.settings.table import markdown_tables

print(markdown_tables())  # noqa: T201 - this is what the module prints when run
