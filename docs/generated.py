"""Write the parts of the manual that are made from the code: the pages of settings and faults, and a picture.

    python docs/generated.py

tests/test_docs.py compares each with what this file makes.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS.parent / "tests"), str(DOCS)]

NOTE = "<!-- Made by `python docs/generated.py`: change the code that it reads, not this page. -->"
MEANINGS = {
    "accumulation-ignored": (
        "An update made another number of passes than `--accumulation` says. The batch size that was tuned "
        "is then not the one that trains. Step the optimizer once in that many micro-batches."
    ),
    "answer-not-learned": (
        "Some tokens of an example's completion are no targets, or the completion was cut. A model cannot "
        "learn answers that it is never shown. Shorten prompts from their left, never answers from their "
        "right."
    ),
    "batch-differs-from-single": (
        "Two prompts continue otherwise in one batch than alone, beyond what rounding explains. Padding "
        "then changes completions. Pad on the left, give padding a document of its own, and count positions "
        "from the first token."
    ),
    "batch-repeated": (
        "The first batches of training are fewer than they should be, and repetitions. Every batch of an "
        "epoch shows other rows: look for a number that is not counted on."
    ),
    "beams-not-by-probability": (
        "Beam search chose two tokens of lower log-probability than the best two have. Rank beams by sums "
        "of log-probabilities, not of logits."
    ),
    "clip-ignored": (
        "The gradient that an update used is larger than `--optimizer.grad_clip`. Clip after unscaling and "
        "before the optimizer steps."
    ),
    "data-out-of-order": (
        "A pass did not read the batch whose turn it was, as when a resumed run begins its data anew. Some "
        "batches then repeat and others never come. Count batches over all updates, also after `--resume`."
    ),
    "documents-not-separated": (
        "Tokens after the end of a document carry the same document id. Give each document of a row an id "
        "of its own, or it sees the one before it."
    ),
    "dropout-ignored": (
        "A dropout that the settings request drops nothing, drops everything, is built with another rate, "
        "or runs in evaluation mode during an update. Two arms of a sweep over dropout would be one. Hand "
        "the setting to every part, and switch the model to training mode before each update."
    ),
    "end-never-learned": (
        "No end of a document is a target. Generation would never stop. Do not mask the end together with "
        "the padding."
    ),
    "evaluation-not-repeatable": (
        "Two passes over one batch in evaluation mode differ. Switch dropout off there, and use no random "
        "number."
    ),
    "first-loss-not-finite": (
        "The first loss is infinite or not a number. Check the weights and `--precision`."
    ),
    "first-loss-too-high": (
        "A model that was never trained does clearly worse than knowing nothing, which costs ln(vocabulary) "
        "nats. Scale the initialisation of the embedding and the head down."
    ),
    "first-loss-too-low": (
        "A model that was never trained does clearly better than knowing nothing. Look for labels that can "
        "be seen in the inputs, or for a loss that is divided by too many tokens."
    ),
    "frozen-parameter-moved": (
        "A parameter that should be frozen got a gradient, or changed. The base of an adapter is then no "
        "longer the published one. Freeze it with `requires_grad_(False)`, and leave it out of the "
        "optimizer and of weight decay."
    ),
    "future-visible": (
        "A prediction depends on a later token, by the gradient. Such a model has an excellent loss and "
        "generates nonsense. Check the attention mask and the order of axes (B, T, C)."
    ),
    "gradient-not-cleared": (
        "An update began with the gradient of the one before and added its own to it. Clear the gradients "
        "of all optimizers after each step."
    ),
    "gradient-not-finite": (
        "The gradient of a prediction is infinite or not a number, as where a mask leaves a token nothing "
        "to attend to. Check the attention mask."
    ),
    "gradient-not-the-mean": (
        "The gradient of a pass is not that of the mean over the targets of the whole update, as when the "
        "gradients of micro-batches are summed. Divide the summed loss of each pass by the targets of all "
        "passes of the update."
    ),
    "id-outside-vocabulary": (
        "The data hold an id for which the embedding has no row. Use the tokenizer that the model was made "
        "for."
    ),
    "label-crosses-documents": (
        "The label of a document's last token is the first token of another document. A document's last "
        "token has no label."
    ),
    "labels-not-next-token": (
        "Labels are not the token that follows: they were made apart from the inputs, shifted twice, or not "
        "at all. Make them in one place, from the very ids that the model reads."
    ),
    "objective-not-the-loss": (
        "What is minimised is not the cross-entropy with the label smoothing and z-loss of the settings. "
        "Smooth by the setting, over the targets only."
    ),
    "order-ignored": (
        "A curriculum was requested, and the first batches are those of another order. Let batches come in "
        "the order of the scores."
    ),
    "order-inverted": (
        "A curriculum was requested, and difficulty, measured again on the batches, does not follow it. Let "
        "the larger score be that of the harder text, of the very ids that are trained on."
    ),
    "other-document-visible": (
        "A prediction depends on another document that is packed in its row. Check the attention mask "
        "against the document ids."
    ),
    "other-row-visible": (
        "A prediction depends on another row of the batch. Check the order of axes (B, T, C): swapped batch "
        "and time axes look right until the shapes differ."
    ),
    "padding-bears-loss": (
        "Labels of padding are targets. Set them to -100: padding is what the document id -1 says, not the "
        "pad id, which may be the id of the end."
    ),
    "padding-visible": "A prediction depends on padding. Check the attention mask.",
    "parameter-not-updated": (
        "An optimizer made no step, or a parameter is in no group of an optimizer or in two. Build the "
        "optimizers last, since what replaces a parameter afterwards is never updated, and let every "
        "optimizer step once in an update."
    ),
    "parameter-without-gradient": (
        "A parameter that should train had no gradient in the first four updates. Look for a detached "
        "tensor, or for a part that nothing reads."
    ),
    "past-invisible": (
        "A prediction does not depend on the tokens before it. The model is then a table of pairs of "
        "tokens. Check the attention mask."
    ),
    "positions-ignored": (
        "Positions that are counted backwards change nothing. Hand the positions of the batch to the model, "
        "which must not count its own."
    ),
    "positions-not-counted": (
        "A position is neither the one before plus 1, nor 0 at the start of a document. Count the positions "
        "of each document from 0."
    ),
    "positions-not-relative": (
        "Outputs change when all rotary positions are raised by the same number. Rotate queries and keys "
        "alike: only the distance between two tokens may matter."
    ),
    "prompt-bears-loss": (
        "Tokens of an example's prompt are targets. The model then learns to write prompts, and the loss is "
        "not that of the answers. Set the labels of a prompt to -100, and let nothing downstream write them "
        "again."
    ),
    "prompt-differs": (
        "A text is stored with other ids than a prompt of that text has in generation. The model is then "
        "prompted in a way that it was never trained on. Build prompts by one function in training, "
        "evaluation and generation."
    ),
    "prompt-in-prediction": (
        "A prediction begins with its own prompt, and would be scored with it. Return only what was added."
    ),
    "row-without-loss": (
        "Rows with text have no target at all. Shorten prompts from their left, never answers from their "
        "right, and mask tokens, not rows."
    ),
    "sampling-not-repeatable": (
        "One seed gave two texts. Sample from a generator of the seed and the row, not from the global one."
    ),
    "schedule-ignored": (
        "An update had another learning rate than the schedule says. Set the rate of every group before the "
        "optimizer steps, also after a resume."
    ),
    "score-not-plain-loss": (
        "The reported loss is not the plain cross-entropy of a row, computed in fp32. Perplexity and bits "
        "per byte come from the loss without label smoothing."
    ),
    "setting-ignored": (
        "A setting has no effect: a key of the model changes nothing, tied matrices are two, a learning "
        "rate differs from that of its parameters, or `--data.loss_on all` leaves prompts out. Look for the "
        "place that should read it."
    ),
    "split-leaks": (
        "More than 25% of the text of one split is in another, or pieces of one file, page or function are "
        "in both. Scores would then measure memory. Group what belongs together (`--data.group_field`), or "
        "let `--fix` find it by its text."
    ),
    "start-doubled": (
        "Documents begin with two start tokens. Either the tokenizer adds it or the data path does, not both."
    ),
    "token-invisible": (
        "A prediction does not depend on its own token, the last one that is read. Labels may have been "
        "shifted twice. Check the attention mask."
    ),
    "token-never-trained": (
        "The data hold a token that the base never saw, and its row of the embedding is frozen. Name it in "
        "`--lora.new_tokens`, so that its row trains, or take the base's own tokenizer."
    ),
    "too-few-positions": (
        "A row reaches a position for which the model has no row in its table. Raise `--model.block_size` "
        "or shorten the rows."
    ),
    "validation-differs": (
        "One batch has another loss by training's function than by validation's, or held-out files are "
        "stored in another form. The best checkpoint would be chosen by another task. Let both call the "
        "same function; `--data.fim_rate` is for training files only."
    ),
    "vocabulary-too-large": (
        "The model has more ids than its tokenizer, as when a default is left in place. Leave "
        "`--model.vocab_size` out to take the tokenizer's."
    ),
    "worse-than-unigram": (
        "Loaded weights do worse than token frequencies alone (for answers to prompts: than knowing "
        "nothing). Check that weights, config and tokenizer belong together."
    ),
}


def meanings() -> dict[str, str]:
    """Return what each fault means by its name, in the order of the names."""
    from guards.subject import FAULTS

    return {name: MEANINGS[name] for name in sorted(FAULTS.split())}


def planted() -> dict[str, list[str]]:
    """Return, by the name of a fault, how the self-test plants it."""
    from selftest.plants import PLANTS

    stories: dict[str, list[str]] = {}
    for plant in PLANTS:
        stories.setdefault(plant.expected, []).append(plant.story)
    return stories


def faults_page() -> str:
    """Return the page with a paragraph for each fault."""
    stories = planted()
    lines = [
        "# Every fault by name",
        NOTE,
        "[Guards](guards.md) stop a run that has one of these faults, unless `--allow NAME` lets it pass. "
        "What stands after *planted* is how `python preflight.py --selftest` puts the fault into a healthy "
        "run, to see it caught under this name.",
    ]
    for name, meaning in meanings().items():
        lines += [f"## {name}", meaning]
        if name in stories:
            lines.append(f"*Planted:* {'; '.join(stories[name])}.")
    return "\n\n".join(lines) + "\n"


def settings_page() -> str:
    """Return the page with a table for each group of settings."""
    from config import CONFIG_GROUPS

    lines = [
        "# Settings",
        NOTE,
        "Every setting is a flag of `python trainingmanager.py` and of `python hyperparam_tune.py`, and a "
        "key of a YAML file for `--config`. Those of a group have its name before them: `--data.source` as a "
        "flag, and `source:` inside `data:` in a file. `python trainingmanager.py --print_config` prints "
        "them all, resolved for the other flags given.",
    ]
    for name, group in CONFIG_GROUPS.items():
        first, helps = documented(group)
        kinds = get_type_hints(group)
        lines += [f"## {name or 'Training'}", first]
        rows = ["| name | type | default | meaning |", "|---|---|---|---|"]
        for field in dataclasses.fields(group):
            default = (
                field.default_factory() if callable(field.default_factory) else field.default
            )  # A missing factory is a sentinel, which cannot be called.
            full = f"{name}.{field.name}".lstrip(".")
            cells = f"`{full}`", kind_of(kinds[field.name]), default_of(default), helps[field.name]
            rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        lines.append("\n".join(rows))
    return "\n\n".join(lines) + "\n"


def documented(group: type) -> tuple[str, dict[str, str]]:
    """Return the first paragraph of a dataclass's docstring, and the text of each of its Args."""
    text = inspect.getdoc(group) or ""
    first, _, args = text.partition("\n\n")
    helps = {
        name: " ".join(words.split())
        for name, words in re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", args, re.MULTILINE)
    }
    return " ".join(first.split()), helps


def kind_of(kind: Any) -> str:
    """Return a field's type in words."""
    inner = [argument for argument in get_args(kind) if argument not in (type(None), ...)]
    if get_origin(kind) is Literal:
        return f"one of {', '.join(f'`{choice}`' for choice in inner)}"
    if get_origin(kind) is tuple:
        return f"list of {kind_of(inner[0])}"
    if get_origin(kind) is dict:
        return f"mapping of name to {kind_of(inner[1])}"
    if inner:  # or None
        return kind_of(inner[0])
    return {bool: "true or false", int: "whole number", float: "number", str: "text"}[kind]


def default_of(value: Any) -> str:
    """Return a default as a YAML file would spell it."""
    if value is None:
        return "not given"
    if value == "":
        return "empty"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(value)}]`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def imports_picture() -> str:
    """Return the picture of the imports between folders."""
    from import_picture import import_picture

    return import_picture()


PAGES = {"settings.md": settings_page, "faults.md": faults_page, "pictures/imports.svg": imports_picture}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), "utf-8")
