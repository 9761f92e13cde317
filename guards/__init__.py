"""The guards, a file for each; `preflight.py` runs them in order. `subject.py` says what a guard is."""
