"""The formats that are read and written, as commands name them: they must not wait for JAX."""

FORMATS = ("open_clip", "huggingface", "openai", "declip", "alip")
