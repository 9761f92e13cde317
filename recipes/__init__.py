"""The recipes: what each trains on, and the one command that runs it whole: `python -m recipes NAME`."""
