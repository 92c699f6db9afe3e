"""Narrow text encoders of the classes that published models have, with tokenizers of single characters."""

from __future__ import annotations

from typing import Any

import transformers
from tokenizers.pre_tokenizers import ByteLevel

from wadi.backbones.sana import INSTRUCTION

_NARROW: dict[str, Any] = {
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 2048,
}
_VL_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def clip_tokenizer() -> transformers.CLIPTokenizer:
    """One token a byte."""
    letters = sorted(ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    vocab = {token: index for index, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def t5_tokenizer() -> transformers.T5Tokenizer:
    """One token a character."""
    letters = [(chr(i), -3.0) for i in range(33, 127)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def gemma_tokenizer() -> transformers.GemmaTokenizer:
    """One token a character, and one for each word of Sana's long instruction."""
    letters = [chr(i) for i in range(33, 127)]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "\n", *letters]
    tokens += [f"<0x{i:02X}>" for i in range(256)]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = transformers.GemmaTokenizer(vocab=vocab, merges=[], model_max_length=2048)
    tokenizer.add_tokens(sorted({word for word in " ".join(INSTRUCTION).split() if len(word) > 3}))
    return tokenizer


def qwen_tokenizer() -> transformers.Qwen2Tokenizer:
    """One token a byte, with a chat template."""
    tokens = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=2048)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    )
    return tokenizer


TOKENIZERS = {
    "CLIPTextModel": clip_tokenizer,
    "CLIPTextModelWithProjection": clip_tokenizer,
    "T5EncoderModel": t5_tokenizer,
    "Gemma2Model": gemma_tokenizer,
    "Qwen3Model": qwen_tokenizer,
    "Qwen3ForCausalLM": qwen_tokenizer,
    "Qwen2_5_VLForConditionalGeneration": qwen_tokenizer,
}
"""By class of the text encoder."""


def text_encoder(kind: str, width: int, words: int, layers: int = 2) -> transformers.PreTrainedModel:
    """A text encoder whose states have `width` numbers.

    Args:
        kind: its class, a key of `TOKENIZERS`.
        width: of its states.
        words: in its vocabulary.
        layers: how many. The pipelines read the states before the last one, or several.
    """
    return getattr(transformers, kind)(_config(kind, width, words, layers)).eval()


def _config(kind: str, width: int, words: int, layers: int) -> transformers.PretrainedConfig:
    sizes = {"vocab_size": words, "hidden_size": width, "num_hidden_layers": layers}
    if kind == "T5EncoderModel":
        small = {"d_kv": 8, "d_ff": 64, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
        return transformers.T5Config(vocab_size=words, d_model=width, num_layers=1, **small)
    if kind.startswith("CLIP"):
        ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        small = {"projection_dim": width, "intermediate_size": 64, "num_attention_heads": 4}
        return transformers.CLIPTextConfig(**sizes, **small, **ids)
    if kind == "Gemma2Model":
        return transformers.Gemma2Config(**sizes, **_NARROW)
    if kind.startswith("Qwen3"):
        return transformers.Qwen3Config(**sizes, **_NARROW)
    heads = width // 128 or 2  # of the rotary embedding, as the published model has them
    rope = {"mrope_section": [16, 24, 24] if width >= 128 else [1, 1, 2], "rope_type": "default"}
    text = {**sizes, **_NARROW, "num_attention_heads": heads, "rope_scaling": {**rope, "type": "default"}}
    del text["head_dim"]
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    vision |= {"out_hidden_size": width, "fullatt_block_indexes": [0]}
    ids = {name: i for i, name in enumerate(_VL_TOKENS)}
    return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
