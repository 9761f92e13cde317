"""Documents from files to tokens: reading, splitting, comparing, storing, ordering. Rows are dataset.py's."""
