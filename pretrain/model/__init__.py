"""The model: a Hugging Face backbone, attention over packed rows, heads, and the generator."""
