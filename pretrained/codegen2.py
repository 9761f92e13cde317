"""CodeGen2 (arXiv:2305.02309): CodeGen 1 trained on eight cores, so that `qkv_proj` has eight shards.

Its folders call themselves `codegen` and name code of their own, which is never run. They are told by that,
if their shape is none of CodeGen 1's; else config.json must say `"model_type": "codegen2"`, as exports do.
"""

from dataclasses import replace

from pretrained import codegen
from pretrained.family import Values

CODE = {
    "AutoConfig": "configuration_codegen.CodeGenConfig",
    "AutoModelForCausalLM": "modeling_codegen.CodeGenForCausalLM",
}
# Layers, width and heads of CodeGen 1 (arXiv:2203.13474): somebody may have given such a folder this code.
SHAPES_OF_1 = ((20, 1024, 16), (32, 2560, 32), (33, 4096, 16), (34, 6144, 24))

FAMILY = replace(
    codegen.FAMILY,
    model_type="codegen2",
    parts=codegen.FAMILY.parts | {"qkv_layout": "shards8"},
    own_code=tuple(CODE.values()),
)


def is_codegen2(values: Values) -> bool:
    """Return whether a config.json with `model_type` codegen is certain to be CodeGen2's."""
    named = values.get("auto_map")
    if values.get("model_type") != "codegen" or not isinstance(named, dict):
        return False
    own = {key: str(name).rpartition("--")[2] for key, name in named.items() if key != "AutoTokenizer"}
    shape = tuple(values.get(key) for key in ("n_layer", "n_embd", "n_head"))
    return own == CODE and shape not in SHAPES_OF_1
