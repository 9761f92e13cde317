"""The guards, a file for each; `preflight.py` here runs them in order. `subject.py` says what a guard is."""
