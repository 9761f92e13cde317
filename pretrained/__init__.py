"""Published models in Plumb's decoder, and back: StarCoder, CodeGen, Phi, Llama, StarCoder2, Qwen2.

    from pretrained import load_pretrained, save_pretrained

    found = load_pretrained("bigcode/starcoder2-3b", dtype=torch.bfloat16)
    save_pretrained(found.model, found.tokenizer, "copy")

One file a family holds what is known of it, as data. `folder.py` reads files that a stranger may have
written; `load.py` and `save.py` know no family.
"""

from pretrained.family import Family
from pretrained.load import FAMILIES, Pretrained, load_pretrained
from pretrained.save import choose_family, save_pretrained

__all__ = ["FAMILIES", "Family", "Pretrained", "choose_family", "load_pretrained", "save_pretrained"]
