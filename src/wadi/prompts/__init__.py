"""Training prompts: read from a file or a data set, encoded once, and kept on the disk."""

from wadi.prompts.cache import EmbeddingCache, Embeddings
from wadi.prompts.encode import PromptEmbeddings, encode_prompts
from wadi.prompts.read import check_length, read_prompts
from wadi.tables import Prompt

__all__ = [
    "EmbeddingCache",
    "Embeddings",
    "Prompt",
    "PromptEmbeddings",
    "check_length",
    "encode_prompts",
    "read_prompts",
]
