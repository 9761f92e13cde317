"""Tokenizers: what tokenizer.py hands on."""
