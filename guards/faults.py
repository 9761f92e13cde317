"""Every fault by name: what it means, and what to do about it.

`FAULTS` is the one table of them. `--allow` takes a name of it, the self-test plants each of them, and
docs/faults.md is made from it.
"""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable

FAULTS: dict[str, str] = {
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
        "Two prompts have other completions in one batch than alone, beyond what rounding explains: padding "
        "changes them. Pad on the left, give padding a document of its own, and count positions from the "
        "first token."
    ),
    "batch-repeated": (
        "The first batches of training repeat each other. Every batch of an epoch should show other rows: "
        "look for a batch number that does not increase."
    ),
    "beams-not-by-probability": (
        "Beam search chose two tokens whose log-probability is lower than that of the best two. Rank beams "
        "by sums of log-probabilities, not of logits."
    ),
    "clip-ignored": (
        "The gradient that an update used is larger than `--optimizer.grad_clip`. Clip after unscaling and "
        "before the optimizer steps."
    ),
    "clip-of-one-rank": (
        "The processes of a run clip by the norm of a part of the gradient, so that they use other "
        "gradients, or one that is too small. Clip by the norm of the gradient that all have added up."
    ),
    "data-out-of-order": (
        "A pass did not read the batch whose turn it was, as when a resumed run begins its data anew. Some "
        "batches then repeat and others are never read. Count batches over all updates, also after "
        "`--resume`."
    ),
    "differs-from-reference": (
        "A quantity of the run is not what the reference derives from the files and the settings alone. The "
        "sentence names the first such quantity, with all before it in agreement. Look at the code that "
        "computes it; whoever changed it on purpose writes it in `reference/` too."
    ),
    "documents-not-separated": (
        "Tokens after the end of a document carry its document id, so that a document sees the one before "
        "it. Give each document of a row an id of its own."
    ),
    "dropout-ignored": (
        "A dropout that the settings request drops nothing, drops everything, has another rate, or is in "
        "evaluation mode during an update. Two runs of a sweep over dropout could then be the same run. "
        "Pass the setting to every part, and switch the model to training mode before each update."
    ),
    "dropout-seeds-equal": (
        "Two processes of a run drop the same elements of their rows, which then are less unlike than the "
        "settings say. Seed each pass by its first row."
    ),
    "end-never-learned": (
        "The end of a document is never a target, so that generation would never stop. Do not mask the end "
        "together with the padding."
    ),
    "evaluation-not-repeatable": (
        "Two passes over one batch in evaluation mode differ. Switch dropout off there, and use no random "
        "number."
    ),
    "first-loss-not-finite": (
        "The first loss is infinite or not a number. Check the weights and `--precision`."
    ),
    "first-loss-too-high": (
        "The first loss of an untrained model is clearly above ln(vocabulary), the loss of a uniform guess. "
        "Scale the initialisation of the embedding and the head down."
    ),
    "first-loss-too-low": (
        "The first loss of an untrained model is clearly below ln(vocabulary), the loss of a uniform guess. "
        "Look for labels that can be seen in the inputs, or for a loss that is divided by too many tokens."
    ),
    "frozen-parameter-moved": (
        "A parameter that should be frozen got a gradient, or changed. The base of an adapter is then no "
        "longer the published one. Freeze it with `requires_grad_(False)`, and leave it out of the "
        "optimizer and of weight decay."
    ),
    "future-visible": (
        "By its gradient, a prediction depends on a later token. Such a model has an excellent loss and "
        "generates nonsense. Check the attention mask and the order of axes (B, T, C)."
    ),
    "gradient-averaged-twice": (
        "The gradient of several processes is a multiple of what it should be: it was divided by their "
        "number though it is a sum over all targets already, or added up twice. Divide by the targets of all "
        "processes, and add up once."
    ),
    "gradient-not-averaged": (
        "An update of several processes used a gradient that is not the sum of theirs. Each then trains on "
        "its own rows, and they are no longer one model. Add up the gradients before the optimizers step."
    ),
    "gradient-not-cleared": (
        "An update began with the gradient of the previous one and added its own to it. Clear the gradients "
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
        "The data contain an id for which the embedding has no row. Use the tokenizer that the model was "
        "made for."
    ),
    "label-crosses-documents": (
        "The label of a document's last token is the first token of another document. The last token of a "
        "document must have no label."
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
        "A curriculum was requested, but the first batches are those of another order. Sort the documents "
        "by their difficulty scores."
    ),
    "order-inverted": (
        "A curriculum was requested, but difficulty, measured again on the batches, does not follow it. A "
        "larger score must mean a harder text, and be computed on the ids that are trained on."
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
        "The output stays the same when positions are counted backwards. Pass the positions of the batch to "
        "the model, which must not count its own."
    ),
    "positions-not-counted": (
        "A position is neither the previous one plus 1, nor 0 at the start of a document. Count the "
        "positions of each document from 0."
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
        "A text is stored with other ids than a prompt with that text has in generation. The model is then "
        "prompted in a way that it was never trained on. Build prompts by one function in training, "
        "evaluation and generation."
    ),
    "prompt-in-prediction": (
        "A prediction begins with its own prompt, which would be scored with it. Return only the new text."
    ),
    "ranks-disagree": (
        "The processes of a run were started with other settings, code or versions. Start all of them "
        "with the same."
    ),
    "ranks-drift": (
        "The weights are not the same on all processes of a run. Begin with the same weights everywhere, and "
        "let the optimizers see the same gradients on machines of one kind."
    ),
    "ranks-see-same-data": (
        "Several processes of a run read the same rows, so that an update is of fewer rows than the settings "
        "say. Let each read its own range."
    ),
    "row-without-loss": (
        "Rows with text have no target at all. Shorten prompts from their left, never answers from their "
        "right, and mask tokens, not rows."
    ),
    "rows-left-out-between-ranks": (
        "Rows of an update were read by no process of a run, and others in their place. Let the ranges of "
        "the processes follow one another without a gap."
    ),
    "sampling-not-repeatable": (
        "One seed gave two different texts. Sample from a generator of the seed and the row, not from the "
        "global one."
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
        "A setting has no effect: a key of the model changes nothing, tied matrices are two, parameters "
        "have another learning rate than the settings say, or `--data.loss_on all` leaves prompts out. Look "
        "for the code that should read the setting."
    ),
    "split-leaks": (
        "More than 25% of the text of one split is also in another, or pieces of one file, page or function "
        "are in both. Scores would then measure memory. Group what belongs together (`--data.group_field`), "
        "or let `--fix` group it by its text."
    ),
    "start-doubled": (
        "Documents begin with two start tokens. Either the tokenizer adds it or the data path does, not both."
    ),
    "token-invisible": (
        "A prediction does not depend on its own token, the last one that is read. Labels may have been "
        "shifted twice. Check the attention mask."
    ),
    "token-never-trained": (
        "The data contain a token that the base never saw, and its row of the embedding is frozen. Name it "
        "in `--lora.new_tokens`, so that its row trains, or use the base's own tokenizer."
    ),
    "too-few-positions": (
        "A row reaches a position for which the model has no row in its table. Raise `--model.block_size` "
        "or shorten the rows."
    ),
    "validation-differs": (
        "The functions of training and validation give one batch different losses, or held-out files are "
        "stored in another form. The best checkpoint would then be chosen by another task. Let both call "
        "the same function; `--data.fim_rate` is for training files only."
    ),
    "vocabulary-too-large": (
        "The model has more ids than its tokenizer, as when a default is left in place. Leave "
        "`--model.vocab_size` out to take the tokenizer's."
    ),
    "worse-than-unigram": (
        "Loaded weights have a higher loss than token frequencies alone (for answers to prompts: than a "
        "uniform guess). Check that weights, config and tokenizer belong together."
    ),
}


class Fault(ValueError):
    """One thing that is wrong, under a name in `FAULTS`.

    Args:
        name: The name, which `--allow` takes.
        evidence: What was found, with its numbers.
        remedy: What to do.
        act: What `--allow` lets go on.
    """

    def __init__(self, name: str, evidence: str, remedy: str, act: str = "train"):
        assert name in FAULTS, name
        self.name, self.evidence, self.remedy = name, evidence, remedy
        super().__init__(f"{name}: {evidence}; {remedy}. To {act} all the same: --allow {name}")


def refuse_unknown_faults(names: Iterable[str]) -> None:
    """Raise a ValueError for a name that no fault has, with the nearest that one has."""
    for name in sorted({*names} - FAULTS.keys()):
        raise ValueError(f"--allow {name} names no fault; {_near(name)}")


def explained(name: str) -> str:
    """Return what a fault means and what to do about it; ValueError for a name that no fault has."""
    if name not in FAULTS:
        raise ValueError(f"{name} is no fault; {_near(name)}")
    return f"{name}\n{textwrap.fill(FAULTS[name], 100, initial_indent='  ', subsequent_indent='  ')}"


def _near(name: str) -> str:
    near = difflib.get_close_matches(name, FAULTS, 1, 0.6)
    return f"did you mean {near[0]}?" if near else "docs/faults.md lists them"
