"""Plumb tried on itself: faults planted in healthy runs, and the proof that a resumed run ends as another."""
