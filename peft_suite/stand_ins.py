"""Write tiny random models into a folder that stands in for the hub's cache (`HF_HOME`): stand_ins.py FOLDER.

Each has the name that PEFT's tests load, and the architecture that the name says.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    RobertaForSequenceClassification,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

PEFT = "peft-internal-testing/tiny-random-"
OPT = f"{PEFT}OPTForCausalLM"
# The usual initialisation is so small that an adapter on a tiny model would change no output noticeably
SPREAD = 0.2
SIZES = {"vocab_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def opt() -> OPTForCausalLM:
    """A decoder."""
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=1024,
            hidden_size=16,
            word_embed_proj_dim=16,
            num_hidden_layers=5,
            num_attention_heads=4,
            ffn_dim=64,
            max_position_embeddings=100,
            init_std=SPREAD,
        )
    )


def llama() -> LlamaConfig:
    """The sizes of a decoder."""
    return LlamaConfig(
        **SIZES, hidden_size=16, num_key_value_heads=4, initializer_range=SPREAD, pad_token_id=0
    )


def gpt2() -> GPT2LMHeadModel:
    """A decoder whose layers are `Conv1D`."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=1024,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=100,
            initializer_range=SPREAD,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def t5() -> T5ForConditionalGeneration:
    """An encoder with a decoder, without biases."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=1024, d_model=32, d_kv=8, d_ff=74, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
    )


def bart() -> BartForConditionalGeneration:
    """An encoder with a decoder."""
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=1024,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=100,
            init_std=SPREAD,
        )
    )


def bert(config: type = BertConfig) -> Any:
    """The sizes of an encoder."""
    return config(**SIZES, hidden_size=32, max_position_embeddings=512, initializer_range=SPREAD)


def stable_diffusion() -> StableDiffusionPipeline:
    """A whole pipeline; its vocabulary is the bytes, without merges."""
    letters = sorted(ByteLevel.alphabet())
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            **{**SIZES, "vocab_size": len(tokenizer)},
            hidden_size=32,
            max_position_embeddings=77,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(16,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
        sample_size=64,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


MODELS: dict[str, Callable[[], Any]] = {
    OPT: opt,
    f"{PEFT}GPT2LMHeadModel": gpt2,
    f"{PEFT}T5ForConditionalGeneration-calibrated": t5,
    f"{PEFT}BartForConditionalGeneration": bart,
    f"{PEFT}BertModel": lambda: BertModel(bert()),
    f"{PEFT}BertForSequenceClassification": lambda: BertForSequenceClassification(bert()),
    f"{PEFT}RobertaModel": lambda: RobertaModel(bert(transformers.RobertaConfig)),
    f"{PEFT}RobertaForSequenceClassification": lambda: RobertaForSequenceClassification(
        bert(transformers.RobertaConfig)
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": lambda: LlamaForCausalLM(llama()),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": lambda: LlamaForSequenceClassification(
        llama()
    ),
    "hf-internal-testing/tiny-sd-pipe": stable_diffusion,
}


def snapshot(root: Path, name: str, revision: str = "main") -> Path:
    """Make the folder where the hub's client looks for a repository."""
    repository = root / "hub" / f"models--{name.replace('/', '--')}"
    commit = hashlib.sha1(name.encode()).hexdigest()
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / revision).write_text(commit)
    return folder


def main(root: Path) -> None:
    """Write all models, and an adapter's configuration under a revision of its own for the tests of those."""
    transformers.utils.logging.disable_progress_bar()
    for name, make in MODELS.items():
        torch.manual_seed(0)
        make().save_pretrained(snapshot(root, name))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": OPT}
    folder = snapshot(root, "peft-internal-testing/tiny-opt-lora-revision", "test")
    (folder / "adapter_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
