"""A second derivation of what a run should compute: plain, slow, in fp64, and written as a textbook is.

    text.py -> rows.py -> weights.py -> forward.py -> update.py -> scores.py -> sampling.py

It is written from the papers and from what the settings say, and shares no code with what it checks. Its
files import each other, the dataclasses of `config`, numpy, torch's plain operations, and the readers of
safetensors and tokenizers, and nothing else (tests/test_floors.py). guards/reference compares it with the
run.
"""
