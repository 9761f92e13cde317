"""Completions of prompts: settings, text, the decoding engine, its rows and their cache."""
