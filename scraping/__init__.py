"""Make a corpus of repositories: fetch, clean, check licences and deduplicate, with every file accounted for.

    python -m scraping COMMAND --help

The path of one file: a source (`crawl`, `clone`, `local`, `site`, `stdlib`) finds it and stores its bytes in
the ledger, or a reason why not. `clean` reads the ledger, decodes the bytes into a document and passes it
through the stages, each of which keeps, changes or drops it with a reason. `dedup` finds duplicates over all
shards. `build` writes the remaining documents as Parquet, with their counts, card and fingerprint, and
`dataset.py` reads them.
"""
