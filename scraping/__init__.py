"""From repositories to a corpus: fetched, cleaned, licensed and deduplicated, with every file accounted for.

    python -m scraping COMMAND --help

The path of one file: a source (`crawl`, `clone`, `local`, `site`, `stdlib`) finds it and stores its bytes in
the ledger, or a reason why not; `clean` reads the ledger, turns bytes into a document and passes it through
the stages, each of which keeps, changes or drops it with a reason; duplicates are found over all shards; what
is left is written as Parquet with its counts, its card and its fingerprint, which `dataset.py` reads.
"""
