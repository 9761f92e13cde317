"""Sweeps: what is tried (space), how it is shared among processes (board), run (trial, worker), and told."""
