"""Suites: examples in, predictions of a model and of its baselines, scores out.

    task = TASKS["pairs"](Given(tokenizer, 512, 200, 0, 0, data))
    settings = CompletionSettings(task.max_new_tokens, 512, precision)
    made = complete(model, tokenizer, task.examples, task.cut, settings)
    record = scored(task.suite, task.examples, {"model": made, **answers(task.baselines(task.examples))})
    print(suite_table(record))

`task` has the interface, and `tasks` the suites by name, each made by one file: `lines`, `pairs` and `gaps`
take examples from held-out files, `codexglue` and `programs` from published ones; `tokens` scores every token
of the held-out files, and `prompts` rewords the prompts of examples. `completing` completes examples by a
model, `kept` lets that go on after an interruption, and `baselines` answers without a model. `scoring` has
scores with intervals and verdicts, `tables` shows them, `passing` has the scores of programs that were run,
and `hidden` a metric by a model's hidden states; `overlaps` and `memorising` find examples and predictions in
the training text. An eval.json is read back by `records`: `rescoring` scores its predictions again,
`comparing` compares several, and `page` shows every sample. `functions` shows completions to look at.
`evaluate` puts them together: `settings` is its command line, `evaluated` the model, and `results` what it
prints and writes.
"""
