"""A sentencepiece BPE model as a tokenizer of Hugging Face's library that gives the same ids for every text.

What it would only approximate is refused by name.
"""

from typing import TYPE_CHECKING, Any

from dsmoe_megatron.errors import TokenizerError

if TYPE_CHECKING:
    import tokenizers

WORD_BOUNDARY = "\u2581"  # how sentencepiece writes a space


def convert_sentencepiece(model: Any, spec: str) -> "tokenizers.Tokenizer":
    """The `tokenizers.Tokenizer` that gives the ids of a sentencepiece BPE model, for every text.

    sentencepiece joins, while it can, the neighbours whose union is the piece of the highest score, wherever that piece
    was joined from before; so each piece yields one merge for every way to cut it in two pieces. (transformers' own
    conversion also makes merges that end in "</s>" or "<0x0A>", which turn these characters in a text into the token.)

    Args:
        model: sentencepiece's ModelProto.
        spec: that it was loaded from, for the message.

    Raises:
        TokenizerError: a setting has no exact counterpart.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    _require_exact_conversion(model, spec)
    piece_type = type(model.pieces[0])
    normal = {p.piece: (p.score, i) for i, p in enumerate(model.pieces) if p.type == piece_type.NORMAL}
    backend = Tokenizer(
        BPE(
            vocab={p.piece: i for i, p in enumerate(model.pieces)},
            merges=_merges(normal),
            unk_token=model.trainer_spec.unk_piece,
            byte_fallback=True,
        )
    )
    space = normalizers.Replace(" ", WORD_BOUNDARY)
    decoding = [decoders.Replace(WORD_BOUNDARY, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(WORD_BOUNDARY), space])
        decoding.append(decoders.Strip(content=" ", left=1))
    else:
        backend.normalizer = space
    backend.decoder = decoders.Sequence(decoding)

    special_types = (piece_type.CONTROL, piece_type.UNKNOWN)
    special = [p.piece for p in model.pieces if p.type in special_types]
    defined = [p.piece for p in model.pieces if p.type == piece_type.USER_DEFINED]
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    backend.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in defined])
    return backend


def _merges(normal: dict[str, tuple[float, int]]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the best-scored results first.

    Args:
        normal: score and id of each normal piece.
    """
    ranked = []
    for piece, (score, _) in normal.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in normal and right in normal:
                ranked.append((-score, normal[left][1], normal[right][1], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _require_exact_conversion(model: Any, spec: str) -> None:
    """Refuse, by name, what a Hugging Face BPE would only approximate."""
    trainer, normalizer, pieces = model.trainer_spec, model.normalizer_spec, model.pieces
    piece_type = type(pieces[0])
    normal = [p for p in pieces if p.type == piece_type.NORMAL]
    characters = {p.piece for p in normal if len(p.piece) == 1}
    joined = [p for p in normal if len(p.piece) > 1]
    defined = [p.piece for p in pieces if p.type == piece_type.USER_DEFINED]
    spaced = [piece for piece in defined if WORD_BOUNDARY in piece or " " in piece]
    orphans = [p.piece for p in joined if not characters.issuperset(p.piece)]
    obstacles = {
        f"model_type {trainer.ModelType.Name(trainer.model_type)} (only BPE)": trainer.model_type != trainer.BPE,
        "byte_fallback false": not trainer.byte_fallback,
        f"normalization {normalizer.name or 'rule'} (only identity)": bool(normalizer.precompiled_charsmap),
        "remove_extra_whitespaces true": normalizer.remove_extra_whitespaces,
        "escape_whitespaces false": not normalizer.escape_whitespaces,
        "treat_whitespace_as_suffix true": trainer.treat_whitespace_as_suffix,
        "a denormalizer": bool(model.denormalizer_spec.precompiled_charsmap),
        "unused pieces": any(p.type == piece_type.UNUSED for p in pieces),
        f"user_defined_symbols with a space {spaced[:1]}": bool(spaced),
        "user_defined_symbols with add_dummy_prefix true": bool(defined) and normalizer.add_dummy_prefix,
        "pieces of equal score": len({p.score for p in joined}) < len(joined),
        f"piece {orphans[:1]} with a character that is no piece": bool(orphans),
    }
    for setting, present in obstacles.items():
        if present:
            raise TokenizerError(f"tokenizer {spec}: {setting} has no exact counterpart in a Hugging Face tokenizer")
