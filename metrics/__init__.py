"""Scores of predicted texts against references, and how sure they are. No torch.

    from metrics.registry import score
    found = score(["codebleu"], cleaned(predictions, references, "plain"), language="python")

Scores of texts go from 0 to 100, and a reference against itself has 100, the empty one too. Predictions and
references are cleaned by the same function, `texts.cleaned`, before anything reads them. `texts`, `bleu`,
`rouge` and `codebleu` know one kind of score each, `registry` has their names, and `intervals` says how far
a score of so many samples can be trusted. The packages that take long to import (sacrebleu, tree-sitter) are
imported where they are used.
"""

from metrics.estimates import bits_per_byte, pass_at_k, perplexity
from metrics.intervals import Interval, mean_interval
from metrics.texts import cleaned, edit_similarity, exact_match

__all__ = [
    "Interval",
    "bits_per_byte",
    "cleaned",
    "edit_similarity",
    "exact_match",
    "mean_interval",
    "pass_at_k",
    "perplexity",
]
