"""Suites: examples in, predictions of a model and of its baselines, scores out.

    task = TASKS["pairs"](Given(tokenizer, 512, 200, 0, 0, data))
    made = complete(model, tokenizer, task.examples, task.cut, task.max_new_tokens, 512, precision)
    record = scored(task.suite, task.examples, {"model": made, **answers(task.baselines(task.examples))})
    print(suite_table(record))

`task` has the interface, and `tasks` the suites by name, each made by one file: `lines`, `pairs` and `gaps`
of held-out files, `codexglue` and `programs` of published ones; `tokens` scores every token of the held-out
files, and `prompts` asks for examples in other words. `completing` asks a model, `kept` lets it go on after
an interruption, and `baselines` answers without one. `scoring` has scores with intervals, verdicts and the
table, `passing` those of programs that were run, `hidden` a metric by a model's hidden states, and
`overlaps` and `memorising` what of it all stands in training. An eval.json is read back by `records`:
`rescoring` holds it to its own predictions, `comparing` sets several side by side, and `page` shows every
sample. `functions` shows completions to look at. `eval.py` puts them together: `settings` is its command
line, `evaluated` the model, and `results` what it prints and writes.
"""
