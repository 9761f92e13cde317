"""Comparison of a folder that was just written with the model that it was written of.

    save_pretrained(model, ..., complete=lambda folder: refuse_other_model(folder, model, allowed))

The reference opens the folder by its files alone, as whoever gets it will. First come the settings, exactly;
then every weight, or of a large tensor a sample; and then the logits of one row, which the model computes in
evaluation, within rounding.
"""

from __future__ import annotations

import json
import math
import sys
import time
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from adapters.layers import LowRank, TrainableRows
from architecture import Decoder
from config import LoraConfig, ModelConfig
from guards.faults import Fault
from guards.reference.comparison import Comparison, Differs, relative_difference
from guards.reference.observed import TABLES, RunWeights, adapter_of, decoded
from guards.reference.rounding import MOST_ROUNDING, of_logits, step_of
from guards.reference.weights import SAMPLED, STEP32, as_stored, compare_settings, pieces, shape_of
from guards.subject import LARGE
from modules.quantized_linear import Linear4bit, StoredLinear, n_weights
from reference.forward import Rows, logits_of
from reference.library import ByteLevelTokens
from reference.peft import PeftAdapter, shortest
from reference.published import PUBLISHED, PublishedWeights, family_of, published_name
from reference.published_settings import settings_of
from reference.tokens import CodeTokens, read_tokenizer
from training.run import TrainedRun

TOKENS = 24  # Of the row whose logits are compared.
GENERATION = "generation_config.json"
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # of the tokenizers that Plumb trains
REMEDY = "look at what the export writes of it"


def refuse_other_model(folder: Path, model: Decoder, allowed: Collection[str]) -> list[Fault]:
    """Compare the folder of a published model with a model in memory, in evaluation and without adapters.

    Returns:
        The difference, if there is one that is allowed.

    Raises:
        Fault: They differ.
    """

    def compare(comparison: Comparison) -> None:
        if not _is_known(comparison, folder):
            return
        for older in (True, False):
            try:
                settings = settings_of(folder, older)
            except (KeyError, ValueError) as error:
                raise Differs("config.json", f"it cannot be read ({error})", REMEDY) from None
            comparison.begin("settings")
            compare_settings(comparison, "config.json", model.config, settings, REMEDY)
        weights = RunWeights(model, model.config, LoraConfig())
        opened = OpenedModel(folder, list(weights), settings.tie_embeddings)
        compare_weights(comparison, weights, opened)
        compare_logits(comparison, model, settings, opened)
        comparison.begin("settings")
        compare_special(comparison, folder)

    return judged("exported model", compare, allowed)


def refuse_other_adapter(folder: Path, run: TrainedRun, allowed: Collection[str]) -> list[Fault]:
    """Compare the folder of an adapter, opened on its base's own files, with a run.

    The matrices of a base in 4 bits are those in memory: which of two codes is nearer is not in its files.
    Returns and errors are those of `refuse_other_model`.
    """
    family, base = run.family, run.base_folder
    assert family is not None and base is not None, "the run has an adapter"

    def compare(comparison: Comparison) -> None:
        if not _is_known(comparison, base):
            return
        settings = replace(settings_of(base), vocab_size=run.model.config.vocab_size)
        comparison.begin("settings")
        compare_settings(comparison, "config.json", run.model.config, settings, REMEDY)
        weights = RunWeights(run.model, run.model.config, run.config.lora, family.key)
        opened = OpenedAdapter(folder, base, run.model, settings, list(weights))
        if opened.published is None:
            comparison.leave_out("the base", "its files are not safetensors")
        compare_weights(comparison, weights, opened)
        compare_logits(comparison, run.model, replace(settings, tie_embeddings=False), opened)
        comparison.begin("settings")
        compare_adapter_settings(comparison, opened, run.config.lora)

    return judged("exported adapter", compare, allowed)


def _is_known(comparison: Comparison, folder: Path) -> bool:
    """Return whether the reference knows the family of a published model; note it where it does not."""
    family = family_of(folder)
    if family not in PUBLISHED:
        comparison.leave_out("what was exported", f"reference/published.py does not know the family {family}")
    return family in PUBLISHED


def judged(what: str, compare: Callable[[Comparison], None], allowed: Collection[str]) -> list[Fault]:
    """Run a comparison, and print that both agree or that a difference is allowed; else raise it."""
    comparison, started = Comparison(), time.perf_counter()
    try:
        with torch.random.fork_rng([]), torch.no_grad():
            compare(comparison)
    except Differs as difference:
        stage = Differs(f"{what}, {difference.stage}", difference.what, difference.remedy)
        remedy = f"{difference.remedy}; nothing was written"
        fault = Fault("differs-from-reference", comparison.evidence(stage), remedy, "export")
        if fault.name not in allowed:
            raise fault from None
        print(f"ALLOWED {fault.name}: {fault.evidence}", file=sys.stderr)
        return [fault]
    agrees = [f"a second opinion agrees: {comparison.summary()}"] if comparison.stages else []
    seconds = time.perf_counter() - started
    print(f"reference, {what}: {'; '.join([*comparison.left_out, *agrees])} ({seconds:.1f} s)")
    return []


# --- the folder -------------------------------------------------------------------------------------


class OpenedWeights(Mapping[str, Tensor]):
    """The weights of an exported folder by our names, in fp64; each is read when it is looked up.

    Args:
        names: Of the parameters that a model of its settings has.
    """

    def __init__(self, names: list[str]):
        self.names = names

    @abstractmethod
    def part(self, name: str, rows: slice) -> Tensor:
        """Return some rows of a weight; KeyError or ValueError where the files do not have them."""

    @abstractmethod
    def base(self, name: str, rows: slice) -> Tensor | None:
        """Return these rows of the base that the folder changes; None where it has all of the weight."""

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.part(name, slice(None))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class OpenedModel(OpenedWeights):
    """The weights of a published model's folder."""

    def __init__(self, folder: Path, names: list[str], tied: bool):
        super().__init__([name for name in names if not (tied and name == "head.weight")])
        self.published = PublishedWeights(folder)

    def part(self, name: str, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.published.shape(name)[0])
        return self.published.rows(name, start, stop).double()

    def base(self, name: str, rows: slice) -> Tensor | None:
        return None


class OpenedAdapter(OpenedWeights):
    """The weights of a base's folder with those of an adapter's.

    Args:
        model: The run's, whose matrices in 4 bits are the base's.
        settings: Those of the base.
    """

    def __init__(self, folder: Path, base: Path, model: Decoder, settings: ModelConfig, names: list[str]):
        super().__init__(names)
        self.model = model
        self.family: str = family_of(base)
        stored = json.loads((folder / "base.json").read_text("utf-8"))["base_format"]
        self.dtype = torch.float32 if stored == "fp32" else torch.bfloat16
        self.is_tied = settings.tie_embeddings
        head, embed = published_name(self.family, "head"), published_name(self.family, "embed")
        self.adapter = PeftAdapter(folder, {head: embed} if self.is_tied else {})
        try:
            self.published: PublishedWeights | None = PublishedWeights(base)
        except FileNotFoundError:
            self.published = None

    @property
    def matrices(self) -> list[str]:
        """The modules whose weight is a matrix."""
        paths = [name.removesuffix(".weight") for name in self.names if name.endswith(".weight")]
        bases = [adapter_of(self.model.get_submodule(path))[0] for path in paths]
        return [
            path for path, base in zip(paths, bases, strict=True) if len(shape_of(base, "weight") or ()) == 2
        ]

    def part(self, name: str, rows: slice) -> Tensor:
        base, (path, _, kind) = self.base(name, rows), name.rpartition(".")
        module = published_name(self.family, path)
        if kind == "bias":
            return self.adapter.bias(module, base)
        return self.adapter.weight(module, base, rows.start or 0, path in TABLES)

    def base(self, name: str, rows: slice) -> Tensor:
        """Return rows of the base; those that its vocabulary grew by, which nobody has, are not numbers."""
        path, _, kind = name.rpartition(".")
        module, _ = adapter_of(self.model.get_submodule(path))
        if kind == "weight" and (self.published is None or isinstance(module, Linear4bit)):
            return decoded(module, rows)
        if self.published is None:
            return module.get_parameter(kind)[rows].double().cpu()
        stored = "embed.weight" if self.is_tied and name == "head.weight" else name
        known = self.published.shape(stored)[0]
        size = module.out_features if isinstance(module, StoredLinear) else len(module.get_parameter(kind))
        start, stop, _ = rows.indices(size)
        found = as_stored(self.published.rows(stored, start, min(stop, known)), module, self.dtype).double()
        unknown = found.new_full((stop - start - len(found), *found.shape[1:]), math.nan)
        return torch.cat((found, unknown))


# --- the stages -------------------------------------------------------------------------------------


def compare_weights(comparison: Comparison, weights: RunWeights, opened: OpenedWeights) -> None:
    """Compare each weight that the model multiplies by, or its change by the adapter, with the files'."""
    comparison.begin("weights")
    for name in opened:
        path, _, kind = name.rpartition(".")
        module, layer = adapter_of(weights.model.get_submodule(path))
        is_whole = path in TABLES and isinstance(layer, LowRank) and layer.magnitude is not None
        shape = shape_of(module, kind)
        assert shape is not None, name
        for start, stop in [(0, shape[0])] if is_whole else pieces(shape, SAMPLED):
            rows = slice(start, stop)
            found, base = weights.part(name, rows).double(), opened.base(name, rows)
            try:
                expected = opened.part(name, rows)
            except (KeyError, ValueError, IndexError, RuntimeError) as error:
                raise Differs(name, f"the files cannot give it ({error})", REMEDY) from None
            stage, tolerance = f"{name} as stored", 0.0
            if base is not None and found.shape == expected.shape:
                # The factors are stored as they are, but rows may be stored as what they add to the base's.
                base = base.nan_to_num()
                found, expected, stage = found - base, expected - base, f"{name}, change by the adapter"
                largest = float(expected.abs().max().nan_to_num()) or 1.0
                tolerance = 4 * STEP32 * (1 + float(base.abs().max()) / largest)
            explanations = {}
            if expected.dim() == 2 and expected.size(0) == expected.size(1):
                explanations["the matrix transposed"] = expected.t
            comparison.close(stage, found, expected, tolerance, REMEDY, explanations)


def compare_logits(
    comparison: Comparison, model: Decoder, config: ModelConfig, opened: OpenedWeights
) -> None:
    """Compare the logits of one row; those of a large model would take long in fp64."""
    comparison.begin("logits")
    if n_weights(model) > LARGE:
        comparison.leave_out("a row of logits", f"the model has {n_weights(model):,} weights")
        return
    tokens = row_of(model)
    found = model(tokens.to(next(model.parameters()).device))
    rows = Rows(tokens, torch.arange(tokens.size(1))[None], torch.zeros_like(tokens))
    weights = dict(opened)
    expected = logits_of(config, weights, rows)
    step = step_of(model)
    tolerance = of_logits(config, step)
    if not relative_difference(found.double().cpu(), expected) <= tolerance:
        tolerance = of_logits(config, step, weights, rows, expected)
        if not tolerance <= MOST_ROUNDING:
            comparison.leave_out("a row of logits", "rounding alone may change them")
            return
    comparison.close("logits of a row", found, expected, tolerance, REMEDY)


def compare_special(comparison: Comparison, folder: Path) -> None:
    """Compare the ids of start, end and padding that both files say, and those of Plumb's own tokenizers."""
    files = (json.loads((folder / name).read_text("utf-8")) for name in ("config.json", GENERATION))
    expected, found = ({key: values.get(key) for key in SPECIAL} for values in files)
    comparison.exact(GENERATION, found, expected, REMEDY)
    if isinstance(read_tokenizer(folder), CodeTokens | ByteLevelTokens):
        comparison.exact("config.json, special ids", expected, SPECIAL, REMEDY)


def compare_adapter_settings(comparison: Comparison, opened: OpenedAdapter, lora: LoraConfig) -> None:
    """Compare adapter_config.json with the run's settings, as whoever reads it will understand them.

    A start that is taken off makes each pair twice as high. Targets are named as shortly as may be.
    """
    found, times = opened.adapter.values, 2 if lora.init == "pissa" else 1
    alpha = lora.alpha * (math.sqrt(times) if lora.rslora else times)
    expected = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": lora.r * times, "lora_alpha": alpha}
    expected |= {"lora_dropout": lora.dropout, "bias": lora.bias, "use_rslora": lora.rslora}
    expected |= {"use_dora": lora.dora, "init_lora_weights": True, "inference_mode": True}
    for key, value in expected.items():
        comparison.exact(f"adapter_config.json, {key}", found.get(key), value, REMEDY)
    able = {published_name(opened.family, path) for path in opened.matrices}
    able = {module for module in able if not opened.adapter.is_copied(module)}
    targets = {*found["target_modules"]}
    comparison.exact("adapter_config.json, target_modules", targets, shortest(targets, able), REMEDY)
    place = Path(found["base_model_name_or_path"])
    is_found = place.is_absolute() or not place.exists()
    comparison.exact("the place of the base, found from any folder", is_found or str(place), True, REMEDY)


def row_of(model: Decoder) -> Tensor:
    """Return a row of tokens (1, T) from all of the vocabulary, and of those whose rows an adapter trains."""
    tokens = torch.randint(model.config.vocab_size, (1, min(TOKENS, model.config.block_size)))
    layer = adapter_of(model.embed)[1]
    if isinstance(layer, TrainableRows):
        trained = layer.ids.cpu()[: tokens.size(1) // 2]
        tokens[0, -len(trained) :] = trained
    return tokens
