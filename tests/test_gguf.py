"""GGUF files: what is written is the model, and what llama.cpp would read otherwise is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_models import (
    BIASED,
    BIGCODE,
    EXPERTS,
    GEMMA,
    LLAMA,
    LONGROPE,
    MODELS,
    PHI,
    PHI3,
    RULES,
    SPECIALS,
    TEXT,
    YARN,
    model_of,
    tokenizer_by,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers

from architecture import Decoder
from guards import llama_server
from guards.faults import Fault
from guards.reference.exported_gguf import OpenedGguf, refuse_other_gguf
from pretrained import gguf_tokenizer, save_gguf, save_pretrained
from reference.formats import gguf_rounding, q4_0_decoded, q8_0_decoded
from tokenizer import CodeTokenizer, PretrainedTokenizer, Tokenizer
from training import export

TYPES = ("f16", "q8_0", "q4_0")
SMALL = tokenizer_by(starts=True)


def written(
    model: Decoder,
    path: Path,
    file_type: str = "f16",
    tokenizer: Tokenizer = SMALL,
    family: str | None = None,
) -> OpenedGguf:
    """Write a file, let the reference open it, and return it."""
    save_gguf.save_gguf(
        model, tokenizer, path, file_type, family,
        complete=lambda hidden: refuse_other_gguf(hidden, model, tokenizer, ()),
    )  # fmt: skip
    return OpenedGguf(path)


# --- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_file_of_each_family_is_the_model_by_a_second_opinion(
    name: str, tmp_path: Path, capsys: Any
) -> None:
    family, settings = MODELS[name]
    model = model_of(settings, SMALL.vocab_size + 3)
    kinds = TYPES if name == "llama" else (TYPES[list(MODELS).index(name) % 3],)
    for file_type in kinds:
        opened = written(model, tmp_path / file_type, file_type, family=family)
        assert opened.values["general.file_type"] == {"f16": 1, "q8_0": 7, "q4_0": 2}[file_type]
        assert opened.tensors["token_embd.weight"].tensor_type.name == (
            "F16" if file_type == "f16" else "Q8_0"
        )
    said = capsys.readouterr()
    assert said.out.count("settings exactly, weights") == len(kinds)
    assert ("no sliding window" in said.err) is ("window" in name)
    assert ("computes GELU by tanh" in said.err) is (name == "gpt_neox")
    assert ("a context of 256, in which both" in said.err) is ("longrope" in name)


def test_a_model_in_bf16_is_written_as_it_is(tmp_path: Path) -> None:
    model = model_of(LLAMA, SMALL.vocab_size).bfloat16()
    opened = written(model, tmp_path / "x")
    found = opened.rows("output.weight", 0, SMALL.vocab_size)
    assert torch.equal(found, model.head.weight.half().double())


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_is_recognised_by_its_parts(rule: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_by(rule)
    opened = written(model_of(LLAMA, tokenizer.vocab_size), tmp_path / "x", tokenizer=tokenizer)
    assert opened.values["tokenizer.ggml.pre"] == rule
    assert opened.values["tokenizer.ggml.add_bos_token"] is False


def test_tokens_have_their_kinds_and_the_markers_of_gaps_their_keys(tmp_path: Path) -> None:
    tokenizer = tokenizer_by(added=("    ", "\t\t"), starts=True)
    opened = written(model_of(LLAMA, tokenizer.vocab_size + 2), tmp_path / "x", tokenizer=tokenizer)
    tokens, kinds = (opened.values[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    by_kind = {kind: [t for t, k in zip(tokens, kinds, strict=True) if k == kind] for kind in (3, 4, 5)}
    unused = [f"[PAD{tokenizer.vocab_size + n}]" for n in range(2)]
    assert by_kind == {3: list(SPECIALS), 4: ["    ", "\t\t"], 5: unused}
    for name, token in zip(("pre", "suf", "mid", "pad"), SPECIALS[1:], strict=True):
        assert opened.values[f"tokenizer.ggml.fim_{name}_token_id"] == tokenizer.token_id(token)
    assert opened.values["tokenizer.ggml.bos_token_id"] == tokenizer.token_id("<|end|>")
    assert opened.values["tokenizer.ggml.add_bos_token"] is True


def test_gaps_without_a_start_are_told_of(tmp_path: Path, capsys: Any) -> None:
    tokenizer = tokenizer_by(starts=True)
    tokenizer.bare_gaps = True
    written(model_of(LLAMA, tokenizer.vocab_size), tmp_path / "x", tokenizer=tokenizer)
    assert "warning: gaps were trained without the start" in capsys.readouterr().err


def test_several_tokens_may_end_a_text(tmp_path: Path) -> None:
    tokenizer = tokenizer_by()
    first = tokenizer.eos_id
    assert first is not None
    tokenizer.eos_ids = (first, 5, 7)
    opened = written(model_of(LLAMA, tokenizer.vocab_size), tmp_path / "x", tokenizer=tokenizer)
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    assert [opened.values[f"tokenizer.ggml.{key}"] for key in keys] == [first, 5, 7]
    tokenizer.eos_ids = (first, 5, 7, 9)
    with pytest.raises(ValueError, match=r"4 tokens end a text .*, and GGUF has keys for 3"):
        written(model_of(LLAMA, tokenizer.vocab_size), tmp_path / "y", tokenizer=tokenizer)


def test_a_piece_that_is_named_as_pad_stays_a_piece(tmp_path: Path) -> None:
    files = dict(tokenizer_by()._files)
    files["tokenizer_config.json"] = '{"eos_token": "<|end|>", "pad_token": "!"}'
    tokenizer = PretrainedTokenizer(files)
    opened = written(model_of(LLAMA, tokenizer.vocab_size), tmp_path / "x", tokenizer=tokenizer)
    assert tokenizer.pad_id is not None
    assert opened.values["tokenizer.ggml.token_type"][tokenizer.pad_id] == 1


def test_a_row_without_a_token_gets_a_text_of_its_own(tmp_path: Path) -> None:
    n = SMALL.vocab_size
    tokenizer = tokenizer_by(added=(f"[PAD{n + 1}]",))
    opened = written(model_of(LLAMA, n + 2), tmp_path / "x", tokenizer=tokenizer)
    assert opened.values["tokenizer.ggml.tokens"][n:] == [f"[PAD{n + 1}]", f"[PAD{n + 1}]_"]


@pytest.mark.parametrize(
    ("file", "shown"),
    [
        ("a\x1b[31m{% x %}.gguf", "a__31m__ x __"),
        ("my-Phi-3-mini.gguf", "my-Phi 3-mini"),
        ("phi3.modern-bert.gguf", "phi 3.modern bert"),
    ],
)
def test_a_name_is_shown_and_not_believed(file: str, shown: str, tmp_path: Path) -> None:
    opened = written(model_of(LLAMA, SMALL.vocab_size), tmp_path / file)
    assert opened.values["general.name"] == shown


# --- the types ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-9, 1e-6, 1e-3, 1.0, 1e3]), st.booleans())
def test_blocks_are_decoded_as_gguf_does_and_lie_within_the_rounding(
    seed: int, size: float, coarse: bool
) -> None:
    values = np.random.default_rng(seed).standard_normal((4, 64)).astype(np.float32) * np.float32(size)
    values = np.round(values / size) * np.float32(size) if coarse else values  # Coarse ones have ties.
    for kind, decoded in (("Q8_0", q8_0_decoded), ("Q4_0", q4_0_decoded)):
        stored = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
        found = decoded(torch.from_numpy(stored).reshape(8, -1)).view(4, 64)
        theirs = torch.from_numpy(gguf.dequantize(stored, gguf.GGMLQuantizationType[kind])).double()
        assert torch.equal(found.float().double(), theirs)
        own = torch.from_numpy(values).double()
        allowed = gguf_rounding(own, kind)
        assert bool(((found - own).abs() <= allowed * (1 + 1e-6) + 1e-6 * own.abs()).all())
        of_step = (1 / 254 if kind == "Q8_0" else 1 / 8) + 2.0**-11  # Of the step, and of the scale.
        assert float(allowed.max()) <= 1.01 * float(own.abs().max()) * of_step + 127 * 2.0**-25


def test_matrices_with_odd_rows_stay_in_16_bits(tmp_path: Path, capsys: Any) -> None:
    model = model_of(LLAMA | {"n_inner": 40}, SMALL.vocab_size)
    kinds = {name: t.tensor_type.name for name, t in written(model, tmp_path / "x", "q4_0").tensors.items()}
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_up.weight"] == "Q4_0"
    assert "2 matrices are written in f16: their rows are no multiple of 32" in capsys.readouterr().err


# --- planted faults -------------------------------------------------------------------------------


def other_order(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(save_gguf, "_order", lambda *args: None)


def other_tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    right = save_gguf._tensors

    def wrong(*args: Any) -> dict[str, Any]:
        found = right(*args)
        change(found)
        return found

    return lambda patch: patch.setattr(save_gguf, "_tensors", wrong)


def other_metadata(**values: Any) -> Callable[[pytest.MonkeyPatch], None]:
    right = save_gguf._metadata
    keys = {f"llama.{key.replace('__', '.')}": value for key, value in values.items()}
    return lambda patch: patch.setattr(save_gguf, "_metadata", lambda *args: right(*args) | keys)


def other_vocabulary(change: Callable[[Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    right = save_gguf.gguf_vocabulary
    return lambda patch: patch.setattr(save_gguf, "gguf_vocabulary", lambda *args: change(right(*args)))


def swapped(found: dict[str, Any]) -> None:
    a, b = "blk.0.ffn_gate.weight", "blk.0.ffn_up.weight"
    found[a], found[b] = found[b], found[a]


def halved(found: dict[str, Any]) -> None:
    for name, tensor in found.items():
        found[name] = tensor._replace(values=tensor.values / 2)


def exchanged(values: list[Any], a: int, b: int) -> list[Any]:
    values = list(values)
    values[a], values[b] = values[b], values[a]
    return values


WRONG: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "rows of queries as they are": (r"blocks\.0\.attention\.q\.weight as F16: \d+ of 4096", other_order),
    "two matrices swapped": (r"blocks\.0\.mlp\.gate\.weight as F16", other_tensors(swapped)),
    "everything halved": (r"embed\.weight as F16", other_tensors(halved)),
    "a matrix left out": (r"no output_norm\.weight", other_tensors(lambda f: f.pop("output_norm.weight"))),
    "a matrix too many": (
        r"does not have: \['rubbish'\]",
        other_tensors(lambda f: f.update(rubbish=f["output_norm.weight"])),
    ),
    "another base of the angles": ("rope_theta: 10000.0, and", other_metadata(rope__freq_base=500.0)),
    "another epsilon": ("norm_eps", other_metadata(attention__layer_norm_rms_epsilon=1e-6)),
    "fewer heads": ("n_head: 4, and the reference has 2", other_metadata(attention__head_count=2)),
    "a longer context": ("block_size: 128, and", other_metadata(context_length=256)),
    "two tokens exchanged": (
        "token 40",
        other_vocabulary(lambda v: replace(v, tokens=exchanged(v.tokens, 40, 41))),
    ),
    "two merges exchanged": (
        "ids of text",
        other_vocabulary(lambda v: replace(v, merges=v.merges[::-1])),
    ),
    "another rule": ("ids of text", other_vocabulary(lambda v: replace(v, pre="starcoder"))),
    "a start that was not trained": ("ids of text 1", other_vocabulary(lambda v: replace(v, starts=False))),
    "a control token that text may spell": (
        r"token 296: \('<\|end\|>', 4\)",
        other_vocabulary(lambda v: replace(v, kinds=[4 if kind == 3 else kind for kind in v.kinds])),
    ),
    "another end": (
        "tokens that end a text: {1}",
        other_vocabulary(lambda v: replace(v, ids=v.ids | {"eos_token_id": 1})),
    ),
    "prefix and suffix exchanged": (
        "ids of a gap",
        other_vocabulary(
            lambda v: replace(v, ids=v.ids | {"fim_pre_token_id": v.ids["fim_suf_token_id"]}),
        ),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_is_written_wrong_never_gets_its_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentence, plant = WRONG[name]
    model = model_of(LLAMA, SMALL.vocab_size)
    plant(monkeypatch)
    with pytest.raises(Fault, match=f"differs-from-reference: GGUF file, .*{sentence}"):
        written(model, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def reversed_experts(found: dict[str, Any]) -> None:
    name = "blk.1.ffn_up_exps.weight"
    first, *rest = (found[name].values, *found[name].others)[::-1]
    found[name] = found[name]._replace(values=first, others=tuple(rest))


def less_one(found: dict[str, Any]) -> None:
    for name in found:
        if name.endswith("norm.weight"):
            found[name] = found[name]._replace(values=found[name].values - 1)


def swapped_factors(found: dict[str, Any]) -> None:
    a, b = (f"rope_factors_{key}.weight" for key in ("short", "long"))
    found[a], found[b] = found[b], found[a]


def other_value(key: str, value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    right = save_gguf._metadata
    return lambda patch: patch.setattr(save_gguf, "_metadata", lambda *args: right(*args) | {key: value})


WRONG_FAMILIES: dict[str, tuple[str, str, Callable[[pytest.MonkeyPatch], None]]] = {
    "experts in another order": (
        "qwen3_moe", r"blocks\.1\.mlp\.experts\.0\.up\.weight as F16", other_tensors(reversed_experts)
    ),
    "another number of chosen experts": (
        "qwen3_moe", "n_chosen", other_value("qwen3moe.expert_used_count", 3)
    ),
    "norms without the 1": ("gemma", r"norm\.weight as F32", other_tensors(less_one)),
    "the lists of longrope exchanged": ("phi3 longrope", "rope_short", other_tensors(swapped_factors)),
    "longrope without its factor": (
        "phi3 longrope", "rope_attention", other_value("phi3.rope.scaling.attn_factor", 1.0)
    ),
    "a longer context of longrope": ("phi3 longrope", "block_size", other_value("phi3.context_length", 600)),
    "yarn of another first context": (
        "llama yarn", "rope_context", other_value("llama.rope.scaling.original_context_length", 64)
    ),
    "yarn with a factor twice": (
        "qwen2 yarn", "rope_attention", other_value("qwen2.rope.scaling.attn_factor", 1.1386)
    ),
    "another multiplier": ("granite", "residual_scale", other_value("granite.residual_scale", 0.5)),
    "blocks in turn": ("gpt_neox", "block", other_value("gptneox.use_parallel_residual", False)),
    "rows of queries of NeoX as they are": ("gpt_neox", r"attention\.qkv\.weight as F16", other_order),
    "rows of queries of Granite as they are": ("granite", r"attention\.q\.weight as F16", other_order),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_FAMILIES)
def test_what_only_some_families_have_is_compared_too(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sentence, plant = WRONG_FAMILIES[name]
    plant(monkeypatch)
    with pytest.raises(Fault, match=f"differs-from-reference: GGUF file, .*{sentence}"):
        written(model_of(MODELS[model][1], SMALL.vocab_size), tmp_path / "x", family=MODELS[model][0])
    assert not list(tmp_path.iterdir())


def test_a_fused_projection_by_heads_is_not_written_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_order(monkeypatch)
    with pytest.raises(Fault, match=r"blocks\.0\.attention\.qkv\.weight as Q8_0"):
        written(model_of(MODELS["bigcode multi-head"][1], SMALL.vocab_size), tmp_path / "x", "q8_0")


# --- what has no form -----------------------------------------------------------------------------


def code_tokenizer() -> Tokenizer:
    return CodeTokenizer.train([TEXT], 340, min_count=0)


def flagged(**flags: bool) -> Callable[[], Tokenizer]:
    return lambda: tokenizer_by(added=(AddedToken("word", **flags),))


REFUSED: dict[str, tuple[str, dict[str, Any], Callable[[], Tokenizer]]] = {
    "CodeGen": (
        "no form of a codegen model .*it with --out FOLDER, or train one with the parts of gpt_bigcode",
        PHI | {"fused_qkv": True, "qkv_layout": "shards", "rotary_layout": "interleaved", "qkv_bias": False,
               "attention_bias": False, "n_kv_head": 4},
        lambda: SMALL,
    ),
    "norms of queries and keys": ("phi2 has no model.qk_norm True", PHI | {"qk_norm": True}, lambda: SMALL),
    "another GELU": (
        "starcoder has no model.mlp gelu:", BIGCODE | {"mlp": "gelu", "n_kv_head": 1}, lambda: SMALL
    ),
    "a scaling by the length": (
        "llama has no model.rope_scaling dynamic",
        LLAMA | {"rope_scaling": "dynamic", "rope_factor": 2.0},
        lambda: SMALL,
    ),
    "yarn without rounding": (
        "llama has no model.rope_truncate False", LLAMA | YARN | {"rope_truncate": False}, lambda: SMALL
    ),
    "longrope that changes where llama.cpp's contexts do not": (
        r"phi3 has no model.rope_context 90 \(below 256\)",
        PHI3 | LONGROPE | {"rope_context": 90},
        lambda: SMALL,
    ),
    "experts whose shares do not sum to 1": (
        "qwen3moe has no model.chosen_sum_to_one False",
        EXPERTS | {"chosen_sum_to_one": False},
        lambda: SMALL,
    ),
    "other layers without rotation": (
        r"smollm3 has no model.unrotated_layers \[1\]",
        LLAMA | {"n_layer": 5, "unrotated_layers": (1,)},
        lambda: SMALL,
    ),
    "a head of its own": (
        "gemma has no model.tie_embeddings False", GEMMA | {"tie_embeddings": False}, lambda: SMALL
    ),
    "llama3 elsewhere": (
        "qwen2 has no model.rope_scaling llama3",
        LLAMA | {"qkv_bias": True, "rope_scaling": "llama3", "rope_factor": 2.0},
        lambda: SMALL,
    ),
    "another width of heads": (
        "starcoder2 has no model.head_dim 24 with 4 heads of a width 64",
        BIASED | {"head_dim": 24},
        lambda: SMALL,
    ),
    "the `code` tokenizer": ("no form in GGUF.*train with --tokenizer.kind bpe", LLAMA, code_tokenizer),
    "a space before a text": (
        "ByteLevel of another kind",
        LLAMA,
        lambda: tokenizer_by(pre_tokenizer={"add_prefix_space": True}),
    ),
    "another rule": (
        r"a pre-tokenizer \(Whitespace of another kind\) that is none of those",
        LLAMA,
        lambda: tokenizer_by(pre_tokenizer={"type": "Whitespace"}),
    ),
    "a normaliser": ("by Lowercase", LLAMA, lambda: tokenizer_by(normalizer=normalizers.Lowercase())),
    "whole words first": ("known here", LLAMA, lambda: tokenizer_by(model={"ignore_merges": True})),
    "bytes as tokens": ("has byte_fallback", LLAMA, lambda: tokenizer_by(model={"byte_fallback": True})),
    "an end of words": (
        "has end_of_word_suffix", LLAMA, lambda: tokenizer_by(model={"end_of_word_suffix": "e"})
    ),
    "a token that eats spaces": ("'word' is lstrip", LLAMA, flagged(lstrip=True)),
    "a token that is a whole word": ("'word' is single_word", LLAMA, flagged(single_word=True)),
    "tokens that overlap": (
        "overlap: here the first one counts",
        LLAMA,
        lambda: tokenizer_by(added=("@@ab", "ab@@@")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_form_is_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    sentence, settings, tokenizer = REFUSED[name]
    made = tokenizer()
    with pytest.raises(ValueError, match=sentence) as error:
        written(model_of(settings, made.vocab_size), tmp_path / "x", tokenizer=made)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_runs_of_spaces_overlap_and_mean_the_same(tmp_path: Path) -> None:
    tokenizer = tokenizer_by(added=tuple(" " * n for n in range(31, 1, -1)))
    written(model_of(LLAMA, tokenizer.vocab_size), tmp_path / "x", tokenizer=tokenizer)


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    tokenizer = PretrainedTokenizer({"tokenizer.json": SMALL._files["tokenizer.json"]})
    with pytest.raises(ValueError, match="names no end token"):
        written(model_of(LLAMA, tokenizer.vocab_size), tmp_path / "x", tokenizer=tokenizer)


def test_a_normaliser_that_llama_cpp_lacks_is_said(capsys: Any) -> None:
    assert (
        gguf_tokenizer.gguf_vocabulary(tokenizer_by("qwen2", normalizer=normalizers.NFC()), 345).pre
        == "qwen2"
    )
    assert "warning: the tokenizer brings text into the form NFC" in capsys.readouterr().err


@pytest.mark.parametrize("value", [1e5, float("nan"), float("-inf")])
def test_a_number_that_16_bits_do_not_hold_is_refused(value: float, tmp_path: Path) -> None:
    model = model_of(LLAMA, SMALL.vocab_size)
    with torch.no_grad():
        model.head.weight[3, 5] = value
    with pytest.raises(ValueError, match=r"output.weight has numbers up to .*, and Q8_0 holds up to 65504"):
        written(model, tmp_path / "x", "q8_0")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(ValueError, match="is there already; name a new file"):
        written(model_of(LLAMA, SMALL.vocab_size), tmp_path / "x")
    assert (tmp_path / "x").read_text() == "mine"


# --- the command ----------------------------------------------------------------------------------


def test_the_command_writes_a_published_folder_as_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("PATH", "")
    save_pretrained(model_of(LLAMA, SMALL.vocab_size), SMALL, tmp_path / "folder")
    export_main = __import__("export").main
    words = ["--base", str(tmp_path / "folder"), "--gguf", str(tmp_path / "x.gguf"), "--type", "q8_0"]
    export_main(words)
    said = capsys.readouterr().out
    assert f"llama model in {tmp_path / 'x.gguf'}, q8_0, 0.1 MB" in said
    assert f"{llama_server.SERVER} is not on the PATH" in said
    model, ids = model_of(LLAMA, SMALL.vocab_size), SMALL.encode(Path(export.DEFAULT_TEXT).read_text())
    prompts = [ids[start : start + 128] for start in range(0, 1024, 128)]
    before, after = (
        export.loss_of(one, prompts)
        for one in (model, llama_server.as_written(copy.deepcopy(model), OpenedGguf(tmp_path / "x.gguf")))
    )
    assert f"its loss is {after:.4f} nats a token, {after - before:+.4f} by rounding (1,016 tokens of" in said
    assert abs(after - before) > 1e-4
    assert OpenedGguf(tmp_path / "x.gguf").values["tokenizer.ggml.add_bos_token"] is True
    for more, sentence in (
        (words, "is there already; name a new file"),
        ([*words[:2], "--gguf", str(tmp_path / "y"), "--merge"], "has no adapters; leave --merge out"),
        (words[:2], "give one of --out FOLDER and --gguf FILE"),
        ([*words[:2], "--out", "x"], "--base and --adapter belong together"),
        (["--run", "x", "--out", "x", "--type", "q4_0"], "--type is for --gguf"),
    ):
        with pytest.raises(SystemExit) as ended:
            export_main(more)
        error = capsys.readouterr().err
        assert ended.value.code == 2 and sentence in error and error.count("\n") == 1


def test_without_the_package_the_command_says_what_gives_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ValueError, match="not installed; `pip install gguf` gives it"):
        export.export(export.ExportConfig(gguf=str(tmp_path / "x"), base="no-such-folder"))
