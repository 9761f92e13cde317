"""The recipes: the data of each, and the one command that runs a whole recipe: `python -m recipes NAME`."""
