"""Sweeps: a search space, its trials shared among processes (board, worker, trial), and a verdict."""
