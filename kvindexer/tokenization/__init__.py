"""Prompts to tokens, tokens to block keys."""
