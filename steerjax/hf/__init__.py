"""Hugging Face in and out: config pair, key map, import, export, chat template, tokenizer files, model card."""
