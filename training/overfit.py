"""The proof of --overfit: a model that has learned its files by heart gives them back to the character."""

from __future__ import annotations

from generation.settings import GenerationConfig
from generation.text import generate
from suites.stored import text_of_example
from tokenization.healing import Prompt
from training.loop import TrainingManager
from training.run import load_run


def prove_overfit(manager: TrainingManager) -> bool:
    """Return whether the model predicts every token, and generates each file or completion to the character.

    A file is generated from its first line, a completion from its prompt. The first failure is the last line
    that is printed.
    """
    scores = manager.validate()
    passed = manager.knows_by_heart(scores)
    verdict = "passed" if passed else "FAILED"
    print(f"check 1, every token is predicted: {verdict}, accuracy is {scores.top1:.4f} of {scores.tokens}")
    run, store = load_run(manager.folder, "last"), manager.data.train
    for number in range(store.n_documents):
        example = text_of_example(store, run.tokenizer, number)
        first, expected = example.prompt, example.reference
        if not store.holds_examples:
            first = expected.split("\n", 1)[0]
            expected = expected[len(first) :]
        if not first + expected:
            continue
        settings = GenerationConfig(max_new_tokens=len(store.document(number)))
        prompt = Prompt([*example.ids]) if example.ids else first
        (completion,) = generate(run.model, run.tokenizer, [prompt], settings, suffix=example.suffix)
        if completion.text == expected and completion.finish_reason == "eos":
            verdict = f"passed, all {len(expected)} characters and the end of the file"
        else:
            verdict = difference(completion.text, expected)
            if len(store.document(number)) > run.config.row_length:
                verdict += (
                    f"; its {len(store.document(number))} tokens do not fit one row of "
                    f"{run.config.row_length}: raise --model.block_size or take a shorter file"
                )
            passed = False
        print(f"check 2, {store.names[number]} regenerated from {first!r}: {verdict}")
        if not passed:
            break
    print(f"run          {manager.folder}")
    return passed


def difference(text: str, expected: str) -> str:
    """Say where a generated text leaves the expected one."""
    differs = [a != b for a, b in zip(text, expected, strict=False)]
    at = differs.index(True) if True in differs else len(differs)
    found, wanted = text[at:][:20], expected[at:][:20]
    return f"FAILED at character {at} of {len(expected)}: {found!r} instead of {wanted!r}"
