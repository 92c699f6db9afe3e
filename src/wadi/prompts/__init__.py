"""Training prompts: read from a file or a data set, and encoded before the training or during it."""

from wadi.prompts.cache import EmbeddingCache, Embeddings
from wadi.prompts.encode import Conditions, PromptEmbeddings, encode_prompts
from wadi.prompts.read import check_length, read_prompts
from wadi.prompts.window import Window
from wadi.tables import Prompt

__all__ = [
    "Conditions",
    "EmbeddingCache",
    "Embeddings",
    "Prompt",
    "PromptEmbeddings",
    "Window",
    "check_length",
    "encode_prompts",
    "read_prompts",
]
