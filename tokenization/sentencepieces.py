"""A tokenizer.json for a tokenizer.model of SentencePiece, by the model's own fields.

    files |= from_sentencepiece(bytes of tokenizer.model, files of the folder)

SentencePiece (Kudo and Richardson 2018, arXiv:1808.06226) normalises a text, writes its spaces as U+2581, and
cuts it into the pieces of a BPE or unigram model. `tokenizers` has each of these parts, so that the two give
the same ids. The package `sentencepiece` is asked only for the names of the fields.
"""

from __future__ import annotations

import json
import re
from typing import Any, cast

import tokenizers
from tokenizers import Regex, decoders, models, normalizers

from tokenization.classes import BUILDERS, DEFAULT_TOKENS
from tokenization.files import parse_json
from tokenization.library import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    library_error,
    refuse_long_pieces,
    start_template,
)
from tokenization.published import token_text

SENTENCEPIECE_FILE = "tokenizer.model"
SPACE = "\u2581"
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType of sentencepiece_model.proto; 3 is words and 4 is characters.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # ModelProto.SentencePiece.Type; 6 is a byte.
NO_TEXT = 1000.0  # nats


def can_read_sentencepiece() -> bool:
    """Return whether the package is there that knows the format."""
    try:
        from sentencepiece import sentencepiece_model_pb2  # noqa: F401
    except ImportError:  # Of protobuf, too, which it does not bring.
        return False
    return True


def from_sentencepiece(data: bytes, files: dict[str, str]) -> dict[str, str]:
    """Return the `tokenizer.json` and `tokenizer_config.json` of a folder with tokenizer.model.

    Pieces that the user defined are whole wherever a text has them: added tokens, which are looked for in the
    normalised text. The classes of transformers that write the parts around a model look in the text itself.
    A text that is one of them and nothing else has no space put before it here; SentencePiece puts one.

    Raises:
        ValueError: The file is damaged, or holds what has no form in a tokenizer.json.
    """
    model = _parsed(data)
    config = parse_json(files.get(CONFIG_FILE, "{}"), CONFIG_FILE)
    name = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    has_class = name in BUILDERS
    try:
        backend = tokenizers.Tokenizer(_model(model))
        _set_parts_around(backend, model)
        state = json.loads(backend.to_str())
    except BaseException as error:
        raise library_error(error, f"{SENTENCEPIECE_FILE} cannot be written as a {TOKENIZER_FILE}") from error
    own = [] if has_class else [piece.piece for piece in model.pieces if piece.type == USER_DEFINED]
    normalized = cast(Any, backend.normalizer).normalize_str
    if changed := [piece for piece in own if normalized(piece) != piece]:
        raise ValueError(
            f"{SENTENCEPIECE_FILE} has the piece {changed[0]!r} of its user, which its own normalisation "
            f"changes; no {TOKENIZER_FILE} can look for it"
        )
    state["added_tokens"] = [
        _added(id, piece.piece, piece.type, has_class)
        for id, piece in enumerate(model.pieces)
        if piece.type in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    spec = model.trainer_spec
    ids = {"bos_token": spec.bos_id, "eos_token": spec.eos_id, "unk_token": spec.unk_id}
    named = {key: model.pieces[id].piece for key, id in ids.items() if 0 <= id < len(model.pieces)}
    config = (DEFAULT_TOKENS.get(name, {}) if has_class else named) | config
    if config.get("add_bos_token") and config.get("bos_token"):
        first, places = token_text(config["bos_token"]), {p.piece: id for id, p in enumerate(model.pieces)}
        if first in places:
            state["post_processor"] = start_template(first, places[first])
    text = json.dumps(state, ensure_ascii=False, indent=2)
    return {TOKENIZER_FILE: text + "\n", CONFIG_FILE: json.dumps(config, indent=2)}


def _parsed(data: bytes) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise ValueError(f"{SENTENCEPIECE_FILE} is damaged: {error}; fetch it again") from error
    kind, unknown = model.trainer_spec.model_type, model.trainer_spec.unk_id
    texts = [piece.piece for piece in model.pieces]
    if kind not in (UNIGRAM, BPE):
        raise ValueError(
            f"{SENTENCEPIECE_FILE} has model_type {kind}; {UNIGRAM} (unigram) and {BPE} (BPE) are known"
        )
    if len({*texts}) < len(texts) or not texts:
        raise ValueError(
            f"{SENTENCEPIECE_FILE} has {len(texts)} pieces, of which {len({*texts})} differ; fetch it again"
        )
    if not 0 <= unknown < len(texts):
        raise ValueError(f"{SENTENCEPIECE_FILE} has {len(texts)} pieces, and its unk_id is {unknown}")
    refuse_long_pieces(dict.fromkeys(texts, 0), SENTENCEPIECE_FILE)  # Each is cut at every place below.
    if unused := sum(piece.type == UNUSED for piece in model.pieces):
        raise ValueError(
            f"{SENTENCEPIECE_FILE} has {unused} pieces that are marked as unused, which no {TOKENIZER_FILE} "
            "can say; save the tokenizer with the program that made it"
        )
    if model.normalizer_spec.escape_whitespaces is False or model.trainer_spec.treat_whitespace_as_suffix:
        raise ValueError(
            f"{SENTENCEPIECE_FILE} writes spaces otherwise than before a word as U+2581, which is not known"
        )
    return model


def _model(model: Any) -> models.Model:
    """Return the BPE or unigram model; merges come by the score of what they make."""
    spec = model.trainer_spec
    if spec.model_type == UNIGRAM:
        # Bytes and control pieces are no text, and lie too low for one to be cut into them.
        lowest = min((piece.score for piece in model.pieces if piece.type == NORMAL), default=0.0) - NO_TEXT
        text = (NORMAL, USER_DEFINED, UNKNOWN)
        pieces = [(p.piece, p.score if p.type in text else lowest) for p in model.pieces]
        return models.Unigram(pieces, spec.unk_id, spec.byte_fallback)
    ids = {piece.piece: id for id, piece in enumerate(model.pieces)}
    normal = {piece.piece: piece.score for piece in model.pieces if piece.type == NORMAL}
    merges = [
        (-score, ids[piece], piece[:cut], piece[cut:])
        for piece, score in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    return models.BPE(
        ids,
        [(left, right) for *_, left, right in sorted(merges)],
        unk_token=model.pieces[spec.unk_id].piece,
        fuse_unk=True,
        byte_fallback=spec.byte_fallback,
    )


def _set_parts_around(backend: tokenizers.Tokenizer, model: Any) -> None:
    """Set what stands before and behind the model."""
    spec, spaced = model.normalizer_spec, model.normalizer_spec.add_dummy_prefix
    before: list[Any] = []
    if spec.precompiled_charsmap:
        before.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:  # Of spaces alone; line breaks stay.
        before.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        before.append(normalizers.Replace(Regex(" {2,}"), " "))
    before.append(normalizers.Replace(" ", SPACE))
    own = [re.escape(piece.piece) for piece in model.pieces if piece.type == USER_DEFINED]
    if spaced and own:  # Added tokens are normalised themselves, each alone, and stay what they are.
        before.append(normalizers.Replace(Regex(rf"\A(?!(?:{'|'.join(own)})\z)(?=[\s\S])"), SPACE))
    elif spaced:
        before.append(normalizers.Prepend(SPACE))
    backend.normalizer = normalizers.Sequence(before)  # pyright: ignore
    after: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(after + [decoders.Strip(" ", 1, 0)] * spaced)  # pyright: ignore


def _added(id: int, text: str, kind: int, has_class: bool) -> dict[str, Any]:
    own = kind == USER_DEFINED
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": own and not has_class}
    return {"id": id, "content": text, **flags, "special": not own}
