"""Suites: examples in, predictions of a model and of its baselines, scores out.

    examples = pair_examples(data.test, tokenizer, 200)
    predictions = {"model": complete(...), "copy": Predictions(copied(examples)), ...}
    record = scored(SUITES["pairs"], examples, predictions)
    print(suite_table(record))

`scoring` has the interface: examples, predictions, scores with intervals, verdicts and the table; `rescoring`
holds a record to its own predictions. `lines`, `functions` and `pairs` make examples of held-out files,
`completing` asks a model, and `baselines` answers without one.
"""
