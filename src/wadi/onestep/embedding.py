"""Load words that were learned by textual inversion."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import TextualInversionLoaderMixin
from diffusers.loaders.textual_inversion import TEXT_INVERSION_NAME_SAFE
from tokenizers import AddedToken

from wadi.errors import WadiError, tell
from wadi.files import explain_os_errors, load_tensors

NAMELESS = ("emb_params", "string_to_param", "string_to_param.*", "*", "clip_l")
"""Names of the only tensor in files of A1111 and Civitai. They are not words; the word is the file's name."""
_PICKLES = (b"PK\3\4", *(bytes([0x80, protocol]) for protocol in range(2, 6)))
"""First bytes of files of torch.save, in its new and its old format."""


def load_embedding(pipeline: DiffusionPipeline, path: str | os.PathLike) -> str:
    """Add a learned word to a pipeline. Prompts can use it in upper or lower case.

    The tokens have the names of diffusers' `load_textual_inversion`: a word of several embeddings has the
    tokens `word`, `word_1` and so on, and the pipelines replace the word by all of them. Unlike in diffusers,
    the word is not found inside another word ("art" in "start"), and it may have upper-case letters.

    Args:
        pipeline: one with a CLIP text encoder.
        path: a safetensors file with one tensor, (n, D) or (D,), or a folder with such a file,
            `learned_embeds.safetensors`. The tensor's name is the word, as diffusers and wadi write it. If it
            is one of `NAMELESS`, as A1111 and Civitai write it, the word is the name of the file (without
            its suffix) or of the folder.

    Returns:
        The word as it is written in the file.

    Raises:
        WadiError: there is no such file, it has another form or is for another model, or the pipeline has the
            word already.
    """
    if not isinstance(pipeline, TextualInversionLoaderMixin) or hasattr(pipeline, "text_encoder_2"):
        raise WadiError(f"{path}: a {type(pipeline).__name__} cannot take a learned word")
    file = Path(path) / TEXT_INVERSION_NAME_SAFE if Path(path).is_dir() else Path(path)
    width = pipeline.text_encoder.get_input_embeddings().weight.shape[1]
    word, rows = _read(file, Path(path), width)
    tokens = [_as_tokenized(pipeline, word)]
    tokens += [f"{tokens[0]}_{i}" for i in range(1, len(rows))]
    _check_new(pipeline, file, word, tokens)
    _add(pipeline, tokens, rows)
    return word


def holds_word(pipeline: DiffusionPipeline, prompt: str, word: str) -> bool:
    """Whether a prompt contains a word that `load_embedding` added to the pipeline."""
    tokenizer = pipeline.tokenizer
    index = tokenizer.convert_tokens_to_ids(_as_tokenized(pipeline, word))
    return index in tokenizer(prompt, truncation=False, verbose=False).input_ids


def as_learned(pipeline: DiffusionPipeline, prompts: Sequence[str]) -> list[str]:
    """Prompts with every learned word of several embeddings spelled as its token.

    diffusers looks for exactly the token's text. For another spelling it would use only the first embedding.
    """
    if not isinstance(pipeline, TextualInversionLoaderMixin) or pipeline.tokenizer is None:
        return list(prompts)
    known = pipeline.tokenizer.added_tokens_encoder
    result = list(prompts)
    for token in (token for token in known if f"{token}_1" in known):
        # a token that begins or ends with a letter must not match inside a longer word
        spelled = r"\s+".join(map(re.escape, token.split()))
        before, after = (r"(?<!\w)" * token[0].isalnum(), r"(?!\w)" * token[-1].isalnum())
        pattern = re.compile(before + spelled + after, re.IGNORECASE)
        result = [pattern.sub(lambda _, token=token: token, prompt) for prompt in result]
        for prompt in result:
            if pattern.search(prompt) and prompt.count(token) > len(pattern.findall(prompt)):
                tell(
                    f"prompt {prompt[:60]!r}: has {token!r} inside another word too, and diffusers puts its "
                    "embeddings there as well; rename the embedding's file, or avoid that word"
                )
    return result


def _read(file: Path, path: Path, width: int) -> tuple[str, torch.Tensor]:
    """Word and embeddings (n, width) of a file."""
    with explain_os_errors(file, "read the embedding"), file.open("rb") as opened:
        beginning = opened.read(9)
        if beginning.startswith(_PICKLES) and beginning[8:] != b"{":  # which follows safetensors' 8 bytes
            raise WadiError(
                f"{file}: is a file of torch.save, which can run code when it is read; convert it, which "
                f"runs nothing: wadi convert {file} --out NEW.safetensors"
            )
    tensors = load_tensors(file)
    if "clip_g" in tensors:
        raise WadiError(
            f"{file}: is a word for SDXL, with embeddings for two text encoders (clip_l and clip_g), but "
            "this model has one; name a word that was learned on this model"
        )
    if len(tensors) != 1:
        names = ", ".join(sorted(tensors)[:4]) or "nothing"
        raise WadiError(f"{file}: is not one learned word (it holds {names}); name a file with one embedding")
    ((word, rows),) = tensors.items()
    if word in NAMELESS:
        tensor, word = word, path.name if path.is_dir() else path.stem
        tell(f"{file}: the embedding's name, {tensor}, is not a word; the word is the file's name, {word}")
    if rows.ndim not in (1, 2) or not rows.numel() or not rows.is_floating_point():
        raise WadiError(
            f"{file}: is not one learned word: {word} has the shape {tuple(rows.shape)}; name a file with "
            "one embedding (n, D)"
        )
    if rows.shape[-1] != width:
        raise WadiError(
            f"{file}: {word} has {rows.shape[-1]} numbers and the model's words have {width}; it was "
            "learned on another model, so name a word of this one"
        )
    if not rows.isfinite().all():
        raise WadiError(f"{file}: {word} has values that are not finite numbers; learn it again")
    return word, rows.view(-1, width)


def _as_tokenized(pipeline: DiffusionPipeline, word: str) -> str:
    """A word as the tokenizer sees it in a prompt. CLIP's tokenizer changes it to lower case."""
    backend = getattr(pipeline.tokenizer, "backend_tokenizer", None)
    normalizer = None if backend is None else backend.normalizer
    return " ".join(word.split()) if normalizer is None else normalizer.normalize_str(word).strip()


def _check_new(pipeline: DiffusionPipeline, file: Path, word: str, tokens: Sequence[str]) -> None:
    vocabulary = pipeline.tokenizer.get_vocab()
    if taken := [token for token in (*tokens, f"{tokens[0]}_1") if not token or token in vocabulary]:
        raise WadiError(
            f"{file}: the model has {taken[0] or word!r} already, as a token of its own or of another "
            "embedding; rename the file, or the tensor in it"
        )
    if f"{tokens[0]}</w>" in vocabulary:
        tell(f"{file}: the model knew the word {word!r}; in prompts it now has the learned meaning")


def _add(pipeline: DiffusionPipeline, tokens: Sequence[str], rows: torch.Tensor) -> None:
    tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
    alone = tokens[0][0].isalnum() and tokens[0][-1].isalnum()
    tokenizer.add_tokens([AddedToken(token, single_word=alone, normalized=True) for token in tokens])
    size = max(len(tokenizer), encoder.get_input_embeddings().num_embeddings)
    encoder.resize_token_embeddings(size, mean_resizing=False)
    weight = encoder.get_input_embeddings().weight
    with torch.no_grad():
        weight[tokenizer.convert_tokens_to_ids(list(tokens))] = rows.to(weight)
