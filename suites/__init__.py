"""Suites: examples in, predictions of a model and of its baselines, scores out.

    task = TASKS["pairs"](Given(tokenizer, 512, 200, 0, 0, data))
    made = complete(model, tokenizer, task.examples, task.cut, task.max_new_tokens, 512, precision)
    record = scored(task.suite, task.examples, {"model": made, **answers(task.baselines())})
    print(suite_table(record))

`task` has the interface, and `tasks` the suites by name, each made by one file: `lines`, `pairs` and `gaps`
of held-out files, `codexglue` and `programs` of published ones; `tokens` scores every token of the held-out
files. `completing` asks a model, `kept` lets it go on after an interruption, and `baselines` answers without
one.
`scoring` has scores with intervals, verdicts and the table, `passing` those of programs that were run, and
`rescoring` holds a record to its own predictions. `functions` shows completions to look at.
"""
