"""Text: tokenizers, incremental detokenisation, chat templates."""
