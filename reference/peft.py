"""An adapter in the two files of Hugging Face PEFT, as PEFT opens it on a base.

adapter_config.json          which modules have what, and with which rank and alpha
adapter_model.safetensors    its tensors, as `base_model.model.` + the published module + what it is

    lora_A.weight (r, I), lora_B.weight (O, r)     a low-rank pair; of an embedding lora_embedding_A (r, V)
                                                   and lora_embedding_B (C, r)
    lora_magnitude_vector (O)                      DoRA's lengths
    token_adapter.trainable_tokens_delta (n, C)    whole rows of a table, in the order of their ids
    weight, bias                                   a trained copy of a module, or a trained bias
    base_layer.weight, base_layer.bias             the same of the base, under a module that has a pair

The config alone decides which modules have a pair: PEFT passes over the tensors of others in silence. Pairs
are named by whole parts of a module's name, copies and rows by any end of it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from reference.adapters import effective, with_rows
from reference.checkpoints import tensors_of

PREFIX = "base_model.model."


class PeftAdapter:
    """An adapter in a folder.

    Args:
        folder: It has the two files.
        tied: The published names of a head and of the table that it shares, if it does: rows of one are
            rows of both.
    """

    def __init__(self, folder: Path, tied: Mapping[str, str]):
        self.values: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        self.tensors = tensors_of(folder / "adapter_model.safetensors")
        self.tied = tied

    def is_copied(self, module: str) -> bool:
        """Return whether a module has a trained copy, which stands in its place."""
        return any(module.endswith(name) for name in self.values["modules_to_save"] or ())

    def is_target(self, module: str) -> bool:
        """Return whether a module has a low-rank pair."""
        named = any(f".{module}".endswith(f".{name}") for name in self.values["target_modules"])
        return named and not self.is_copied(module)

    def rank(self, module: str) -> int:
        """Return the rank of a module's pair; a key of the pattern is a regular expression."""
        return of_pattern(self.values["rank_pattern"], module, self.values["r"])

    def scale(self, module: str) -> float:
        """Return alpha / r, or alpha / sqrt(r) with rsLoRA."""
        alpha = of_pattern(self.values["alpha_pattern"], module, self.values["lora_alpha"])
        r = self.rank(module)
        return alpha / (math.sqrt(r) if self.values["use_rslora"] else r)

    def weight(self, module: str, base: Tensor, start: int, is_table: bool) -> Tensor:
        """Return rows of the weight that a module multiplies by, in fp64.

        Args:
            base: (n, I) rows of the base's weight, from `start` on; with DoRA all rows of a table, over which
                its lengths are.
            is_table: It is an embedding, whose pair is that of the transposed table.

        Raises:
            KeyError: A tensor is missing that the config speaks of.
            ValueError: A pair has other shapes than the config and the base say.
        """
        rows = slice(start, start + len(base))
        if self.is_copied(module):
            return self._tensor(module, "weight")[rows].double()
        own = self._of_base(module, "base_layer.weight")
        weight = (base if own is None else own[rows]).double()
        ids, values = self._rows(module)
        inside = [place for place, id in enumerate(ids) if rows.start <= id < rows.stop]
        if inside:
            places = weight.new_tensor([ids[place] - start for place in inside]).long()
            weight = with_rows(weight, places, values[inside])
        return self._changed(module, weight, rows, is_table) if self.is_target(module) else weight

    def bias(self, module: str, base: Tensor) -> Tensor:
        """Return the bias that a module adds, in fp64."""
        if self.is_copied(module):
            return self._tensor(module, "bias").double()
        kind = "base_layer.bias" if self.is_target(module) else "bias"
        return self.tensors.get(f"{PREFIX}{module}.{kind}", base).double()

    def _changed(self, module: str, weight: Tensor, rows: slice, is_table: bool) -> Tensor:
        names = ("lora_embedding_A", "lora_embedding_B") if is_table else ("lora_A.weight", "lora_B.weight")
        a, b = (self._tensor(module, name).double() for name in names)
        r = self.rank(module)
        if len(a) != r or b.size(1) != r:
            raise ValueError(f"A is {[*a.shape]} and B {[*b.shape]}, where the config says rank {r}")
        magnitude = None
        if self.values["use_dora"]:
            magnitude = self._tensor(module, "lora_magnitude_vector").double()
        if is_table:
            return effective(weight.T, a[:, rows], b, self.scale(module), magnitude=magnitude).T
        of_rows = None if magnitude is None else magnitude[rows]
        return effective(weight, a, b[rows], self.scale(module), magnitude=of_rows)

    def _rows(self, module: str) -> tuple[list[int], Tensor]:
        """Return the ids whose rows were trained whole, and these rows."""
        of_all: dict[str, list[int]] = self.values["trainable_token_indices"] or {}
        for name in self._names(module):
            ids = next((ids for key, ids in of_all.items() if name.endswith(key)), [])
            if ids:
                return ids, self._tensor(name, "token_adapter.trainable_tokens_delta")
        return [], Tensor()

    def _of_base(self, module: str, kind: str) -> Tensor | None:
        """Return what the folder holds of the base itself, whose vocabulary was grown."""
        keys = [f"{PREFIX}{name}.{kind}" for name in self._names(module)]
        return next((self.tensors[key] for key in keys if key in self.tensors), None)

    def _names(self, module: str) -> list[str]:
        return [module, self.tied[module]] if module in self.tied else [module]

    def _tensor(self, module: str, kind: str) -> Tensor:
        return self.tensors[f"{PREFIX}{module}.{kind}"]


def meant(targets: Collection[str], modules: Collection[str]) -> set[str]:
    """Return the modules that `target_modules` names, by the whole name or by its last parts."""
    return {name for name in modules if any(f".{name}".endswith(f".{target}") for target in targets)}


def shortest(targets: Collection[str], modules: Collection[str]) -> set[str]:
    """Return the last parts of the names that targets mean, or their whole names where more have those parts.

    Args:
        modules: Those that could be a target.
    """
    names = meant(targets, modules)
    leaves = {name.rpartition(".")[2] for name in names}
    return leaves if meant(leaves, modules) == names else names


def of_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Return the value of the first key that matches the end of a module's name, or the default."""
    return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
