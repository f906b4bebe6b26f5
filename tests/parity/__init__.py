"""Equality with transformers and peft, the only tests that import them."""
