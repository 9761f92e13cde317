"""Tokenizers, a file for each kind and each part. Import them from `tokenizer`."""
